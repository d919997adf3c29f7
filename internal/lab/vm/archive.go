// Package vm runs virtual machines in tests: what their first file system holds, and a disk that loses what was not flushed when the
// power goes.
package vm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Archive is a cpio archive in the "newc" format, which the kernel unpacks as its first file system
// (Documentation/driver-api/early-userspace/buffer-format.rst). The zero value is empty.
type Archive struct {
	buf  bytes.Buffer
	dirs []string
}

// File adds a file and the folders that it lies in. name has no leading slash.
func (a *Archive) File(name string, data []byte, mode uint32) {
	for i, c := range name {
		if c == '/' && !slices.Contains(a.dirs, name[:i]) {
			a.dirs = append(a.dirs, name[:i])
			a.entry(name[:i], nil, 0o040755)
		}
	}
	a.entry(name, data, 0o100000|mode)
}

// Modules adds kernel modules of a folder with lib/modules/VERSION, and all that they need, and a list of them in the order in which they are to
// be loaded: /lib/modules and /modules.
func (a *Archive) Modules(dir string, want ...string) error {
	deps, err := filepath.Glob(filepath.Join(dir, "lib/modules/*/modules.dep"))
	if err == nil && len(deps) != 1 {
		err = fmt.Errorf("%s has %d lists of modules", dir, len(deps))
	}
	if err != nil {
		return err
	}
	text, err := os.ReadFile(deps[0])
	if err != nil {
		return err
	}
	list := moduleList(string(text), want)
	for _, name := range list {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(deps[0]), name))
		if err != nil {
			return err
		}
		a.File("lib/modules/"+name, data, 0o644)
	}
	a.File("modules", []byte(strings.Join(list, "\n")+"\n"), 0o644)
	return nil
}

// moduleList gives modules and all that they need, in the order in which they are to be loaded. deps is modules.dep(5).
func moduleList(deps string, want []string) (list []string) {
	needs := map[string][]string{} // by name
	for line := range strings.Lines(deps) {
		file, more, _ := strings.Cut(line, ":")
		needed := strings.Fields(more)
		slices.Reverse(needed) // as modprobe loads them
		needs[strings.TrimSuffix(filepath.Base(file), ".ko")] = append(needed, file)
	}
	for _, name := range want {
		for _, file := range needs[name] {
			if !slices.Contains(list, file) {
				list = append(list, file)
			}
		}
	}
	return list
}

func (a *Archive) entry(name string, data []byte, mode uint32) {
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *Archive) pad() { a.buf.Write(make([]byte, -a.buf.Len()&3)) }

// End closes the archive and gives it.
func (a *Archive) End() []byte {
	a.entry("TRAILER!!!", nil, 0)
	return a.buf.Bytes()
}

// Kernel finds the one kernel below a folder's boot.
func Kernel(dir string) (string, error) {
	kernels, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return "", fmt.Errorf("%s has kernels %v, %v", dir, kernels, err)
	}
	return kernels[0], nil
}

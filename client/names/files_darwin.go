package names

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

var mechanisms = []func(context.Context, Options, *scope, func(string) bool) (mechanism, error){startFiles}

// resolverDir holds one file for each domain with resolvers of its own (resolver(5)).
const resolverDir = "/etc/resolver"

// ours is the first line of a file that is ours. After a killed process files stay behind; the next one removes them.
const ours = "# made by culvert, removed with its tunnel\n"

// files are scoped resolver files.
type files struct{ paths []string }

func (*files) name() string { return "resolver files" }

func startFiles(_ context.Context, opts Options, s *scope, _ func(string) bool) (mechanism, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: resolver files need root", errUnsupported)
	}
	if err := os.MkdirAll(resolverDir, 0o755); err != nil {
		return nil, fmt.Errorf("make resolver files: %w", err)
	}
	text := ours + "# " + opts.Interface + "\n"
	for _, server := range s.servers {
		text += "nameserver " + server.String() + "\n"
	}
	f := &files{}
	f.sweep()
	for _, domain := range s.domains() {
		path := filepath.Join(resolverDir, domain)
		file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err == nil {
			_, err = file.WriteString(text)
			err = errors.Join(err, file.Close())
			f.paths = append(f.paths, path)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make resolver files: %w", err), f.close())
		}
	}
	return f, nil
}

// sweep removes what a killed process left: files of ours whose interface is gone.
func (*files) sweep() {
	entries, _ := os.ReadDir(resolverDir)
	for _, e := range entries {
		path := filepath.Join(resolverDir, e.Name())
		data, err := readBounded(path)
		if err != nil || !bytes.HasPrefix(data, []byte(ours)) {
			continue
		}
		_, rest, _ := strings.Cut(string(data), "\n# ")
		name, _, _ := strings.Cut(rest, "\n")
		if !interfaceExists(name) {
			_ = os.Remove(path)
		}
	}
}

func (f *files) close() error {
	var all []error
	for _, path := range f.paths {
		all = append(all, os.Remove(path))
	}
	return errors.Join(all...)
}

func interfaceExists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

// Command sbom writes what a Go program is made of, as CycloneDX 1.6: the modules that the linker has noted in it. The same program
// gives the same bytes.
package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

type bom struct {
	Format       string       `json:"bomFormat"`
	Spec         string       `json:"specVersion"`
	Serial       string       `json:"serialNumber"`
	Version      int          `json:"version"`
	Metadata     metadata     `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Type    string `json:"type"`
	Ref     string `json:"bom-ref"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl,omitempty"`
	Hashes  []hash `json:"hashes,omitempty"`
}

type hash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn"`
}

// describe gives the document for a program that goes by this name and version.
func describe(name, version string, program []byte) (bom, error) {
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		return bom{}, fmt.Errorf("read what %s is made of: %w", name, err)
	}
	sum := sha256.Sum256(program)
	b := bom{Format: "CycloneDX", Spec: "1.6", Serial: serial(sum), Version: 1}
	b.Metadata.Component = component{
		Type: "application", Ref: name, Name: name, Version: version, PURL: purl(info.Main.Path, "v"+version),
		Hashes: []hash{{"SHA-256", hex.EncodeToString(sum[:])}},
	}
	b.Components = []component{library("std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		b.Components = append(b.Components, library(m.Path, m.Version))
	}
	all := dependency{Ref: name}
	for _, c := range b.Components {
		all.DependsOn = append(all.DependsOn, c.Ref)
	}
	b.Dependencies = []dependency{all}
	return b, nil
}

func library(path, version string) component {
	p := purl(path, version)
	return component{Type: "library", Ref: p, Name: path, Version: version, PURL: p}
}

func purl(path, version string) string {
	return "pkg:golang/" + strings.ToLower(path) + "@" + strings.ReplaceAll(version, "+", "%2B")
}

// serial is a UUID of version 8 (RFC 9562, section 5.8) that follows from the program.
func serial(sum [sha256.Size]byte) string {
	b := sum[:16]
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// run is: sbom NAME VERSION PROGRAM > FILE
func run(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: sbom NAME VERSION PROGRAM")
	}
	program, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	b, err := describe(args[0], args[1], program)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", " ")
	return out.Encode(b)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

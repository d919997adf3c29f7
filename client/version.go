package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by the linker for releases (-X main.version=v1.2.3).
var version string

// versionCommand shows the version.
type versionCommand struct{}

type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"` // of the sources, where they were under version control
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func (*versionCommand) run(_ context.Context, env environment, flags common) error {
	info := versionInfo{
		Version:  buildVersion(),
		Revision: revision(),
		Go:       runtime.Version(),
		Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	if flags.JSON {
		print(env.stdout, info)
		return nil
	}
	fmt.Fprintf(env.stdout, "culvert %s %s %s\n", info.Version, info.Platform, info.Go)
	return nil
}

// buildVersion is the release, or what Go noted when it built the program.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "development"
}

func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			return setting.Value
		}
	}
	return ""
}

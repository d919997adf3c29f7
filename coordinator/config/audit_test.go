package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestAuditAndPrivate(t *testing.T) {
	c, err := Parse("/etc/culvert/culvert.yaml", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Audit{Copy: AuditStdout, Keep: DefaultAuditKeep, MaxSize: DefaultAuditSize}, c.Audit); d != "" {
		t.Errorf("silent file: %s", d)
	}
	if c.Private != (Private{}) || c.Socket() != "/var/lib/culvert/private.sock" {
		t.Errorf("private %+v, socket %s", c.Private, c.Socket())
	}
	if c.Downloads != "" {
		t.Errorf("downloads from %q", c.Downloads)
	}
	c, err = Parse("/etc/culvert/culvert.yaml", []byte(minimal+`
downloads: releases
audit: {log: audit.jsonl, keep: 30d, max_size: 5 GiB, key: audit.pem, former_keys: [abc]}
private: {listen: "127.0.0.1:9090", secret_sha256: `+secretHash+"}\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := Audit{Copy: "/etc/culvert/audit.jsonl", Keep: 30 * 24 * time.Hour, MaxSize: 5 << 30, KeyFile: "/etc/culvert/audit.pem", FormerKeys: []string{"abc"}}
	if d := cmp.Diff(want, c.Audit); d != "" {
		t.Error(d)
	}
	if c.Downloads != "/etc/culvert/releases" {
		t.Errorf("downloads from %q", c.Downloads)
	}
	if c.Private.Listen != "127.0.0.1:9090" || c.Private.SecretSHA256[0] != 0x5f {
		t.Errorf("private %+v", c.Private)
	}
	if c, err = Parse("culvert.yaml", []byte(strings.Replace(minimal, "{dir: /var/lib/culvert}", "{nats: [tls://n1:4222]}", 1)+"audit: {log: off}\n")); err != nil || c.Audit.Copy != AuditOff || c.Socket() != "" {
		t.Errorf("%+v %v", c.Audit, err)
	}
}

func TestAuditFiles(t *testing.T) {
	for _, file := range []string{"audit.jsonl", "./records", "logs/audit", "/var/log/culvert/audit"} {
		c, err := Parse("culvert.yaml", []byte(minimal+"audit: {log: "+file+"}\n"))
		if err != nil || !strings.HasSuffix(c.Audit.Copy, strings.TrimPrefix(file, "./")) {
			t.Errorf("%s: %+v, %v", file, c, err)
		}
	}
}

func TestAuditAndPrivateRefused(t *testing.T) {
	for doc, want := range map[string]string{
		"audit: {keep: 5}":                               "is no time of at least an hour",
		"audit: {keep: 30m}":                             "is no time of at least an hour",
		"audit: {keep: xd}":                              "is no time of at least an hour",
		"audit: {max_size: 10}":                          "is no size of at least 64MiB",
		"audit: {max_size: 10GB}":                        "is no size of at least 64MiB",
		"audit: {max_size: 99999999999TiB}":              "is no size of at least 64MiB",
		"audit: {log: stdout, tail: 5}":                  "tail",
		"audit: {log: stdut}":                            `"stdut" is neither stdout nor off nor the path of a file; did you mean "stdout"?`,
		"audit: {log: OFF}":                              `did you mean "off"?`,
		"audit: {log: records}":                          "write a file of that name as ./records",
		"private: {listen: nowhere}":                     "is not an address to listen on",
		`private: {listen: ":443"}`:                      "is the public listener's address",
		"private: {secret_sha256: " + secretHash + "}":   "a secret without a listener",
		`private: {listen: ":9090", secret_sha256: abc}`: "not a SHA-256",
	} {
		if _, err := Parse("culvert.yaml", []byte(minimal+doc+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", doc, err, want)
		}
	}
}

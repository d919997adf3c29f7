package agent

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// keyFile is the name of the WireGuard private key in a state folder: standard base64 and a newline, as `wg genkey` writes it.
const keyFile = "wireguard.key"

// credential gives the Authorization header's value for the coordinator, read anew.
func (o *Options) credential() (wire.Secret, error) {
	file, scheme := o.IdentityTokenFile, wire.SchemeBearer
	if file == "" {
		file, scheme = o.EnrolTokenFile, wire.SchemeEnrol
	}
	data, err := readBounded(file, wire.MaxToken)
	if err != nil {
		return "", problem.Wrap(err, problem.BadConfig, "the credential for the coordinator cannot be read: "+err.Error(),
			"check the file's path, and that the gateway's user may read it")
	}
	text := strings.TrimSpace(string(data))
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", problem.New(problem.BadConfig, fmt.Sprintf("%s does not hold one token on one line", file),
			"write the token, and nothing else, into the file")
	}
	return wire.Secret(scheme + " " + text), nil
}

// readBounded reads a file of at most limit bytes.
func readBounded(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: larger than %d bytes", file, limit)
	}
	return data, nil
}

// loadKey gives the gateway's WireGuard key: the one in dir, a fresh one kept there, or one in memory alone without dir.
func loadKey(dir string, log *slog.Logger) (wire.PrivateKey, error) {
	if dir == "" {
		return wire.NewPrivateKey()
	}
	key, err := readKey(filepath.Join(dir, keyFile), log)
	if err == nil {
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return wire.PrivateKey{}, problem.Wrap(err, problem.BadConfig, "the WireGuard key cannot be read: "+err.Error(),
			"restore the file, or remove it to get a new key; runners that pin the old one must be told")
	}
	if key, err = wire.NewPrivateKey(); err == nil {
		err = writeKey(dir, key)
	}
	if err != nil {
		return wire.PrivateKey{}, problem.Wrap(err, problem.BadConfig, "the WireGuard key cannot be kept: "+err.Error(),
			"check --state-dir: the gateway's user must be able to write there")
	}
	return key, nil
}

func readKey(file string, log *slog.Logger) (wire.PrivateKey, error) {
	data, err := readBounded(file, 256)
	if err != nil {
		return wire.PrivateKey{}, err
	}
	if info, err := os.Stat(file); err == nil && info.Mode().Perm()&0o077 != 0 {
		log.Warn("others may read the gateway's WireGuard key", "file", file, "mode", info.Mode().Perm().String())
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(data)))
	if err != nil || len(raw) != wire.KeySize {
		return wire.PrivateKey{}, fmt.Errorf("read %s: not a WireGuard key", file) // the cause would quote the key
	}
	return wire.PrivateKeyFromBytes(raw)
}

// writeKey puts the key in place in one step, readable by its owner alone: a crash leaves all of it or nothing.
func writeKey(dir string, key wire.PrivateKey) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, keyFile+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.WriteString(base64.StdEncoding.EncodeToString(key.Bytes()) + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), filepath.Join(dir, keyFile)); err != nil {
		return err
	}
	if d, err := os.Open(dir); err == nil { // best effort: not every file system can sync a folder
		_ = d.Sync()
		_ = d.Close()
	}
	return nil
}

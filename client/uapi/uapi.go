// Package uapi shows a tunnel to tools for WireGuard, `wg show` above all, over the socket at which they look for implementations in user
// space (https://www.wireguard.com/xplatform/). It answers and takes no orders: a session is changed by its coordinator and its gateway
// alone. And it never gives the private key, which those tools take for an interface that has none: the key leaves its owner's memory for
// nobody.
package uapi

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/tunnel"
)

// Dir is where tools look for sockets.
const Dir = "/var/run/wireguard"

const (
	suffix     = ".sock"
	maxRequest = 4 << 10 // bytes that one connection may send
	maxConns   = 16
	idle       = 10 * time.Second
	refused    = -int(syscall.EPERM)
)

// State is what is shown.
type State struct {
	Port  uint16
	Peers []tunnel.PeerState
}

// Options configure a [Server].
type Options struct {
	Dir   string // default [Dir]
	Name  string // of the interface
	State func() State
}

// Validate fills in the default.
func (o *Options) Validate() error {
	if o.Dir == "" {
		o.Dir = Dir
	}
	if o.Name == "" || strings.ContainsAny(o.Name, "/\x00") || o.State == nil {
		return errors.New("a socket for tools needs an interface's name and what to show")
	}
	return nil
}

// Server serves one interface's socket, which only its owner may open.
type Server struct {
	opts     Options
	listener *net.UnixListener
	made     bool // the folder, by us or by a tunnel that has died
	slots    chan struct{}
	wait     sync.WaitGroup
}

// Listen makes the socket, and removes those of tunnels that have died. An error is no reason to do without the tunnel.
func Listen(opts Options) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Server{opts: opts, slots: make(chan struct{}, maxConns)}
	if err := os.Mkdir(opts.Dir, 0o700); err == nil {
		s.made = true
	} else if !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make a folder for tools' sockets: %w", err)
	}
	if sweep(opts.Dir, opts.Name) && empty(opts.Dir) {
		s.made = true // by one of those
	}
	path := s.path()
	var err error
	if s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		s.tidy()
		return nil, fmt.Errorf("open a socket for tools: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = s.listener.Close()
		s.tidy()
		return nil, fmt.Errorf("keep others from the socket for tools: %w", err)
	}
	s.wait.Go(s.accept)
	return s, nil
}

func (s *Server) path() string { return filepath.Join(s.opts.Dir, s.opts.Name+suffix) }

// Close removes the socket and waits.
func (s *Server) Close() error {
	err := s.listener.Close() // removes its file
	s.wait.Wait()
	s.tidy()
	return err
}

// tidy removes the folder if it was made here and nobody else uses it.
func (s *Server) tidy() {
	if s.made {
		_ = os.Remove(s.opts.Dir)
	}
}

// Sweep removes what tunnels that were killed have left in a folder, as far as this user may.
func Sweep(dir string) {
	if sweep(dir, "") && empty(dir) {
		_ = os.Remove(dir)
	}
}

// sweep removes sockets that nobody listens at: the one that is to be made, and those of interfaces of ours that are gone.
func sweep(dir, name string) (some bool) {
	paths, err := filepath.Glob(filepath.Join(dir, "culvert[0-9]*"+suffix))
	if err != nil {
		return false // only a bad pattern
	}
	for _, path := range append(paths, filepath.Join(dir, name+suffix)) {
		other := strings.TrimSuffix(filepath.Base(path), suffix)
		if _, err := net.InterfaceByName(other); err == nil && other != name {
			continue
		}
		conn, err := net.Dial("unix", path)
		if err == nil {
			_ = conn.Close()
		} else if errors.Is(err, syscall.ECONNREFUSED) && os.Remove(path) == nil {
			some = true
		}
	}
	return some
}

func empty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

func (s *Server) accept() {
	for {
		conn, err := s.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(idle / 1000) // out of descriptors, for a while
			continue
		}
		select {
		case s.slots <- struct{}{}:
			_ = conn.SetDeadline(time.Now().Add(idle))
			s.wait.Go(func() {
				defer func() { <-s.slots }()
				defer conn.Close()
				s.serve(conn)
			})
		default:
			_ = conn.Close()
		}
	}
}

// serve answers one connection's requests.
func (s *Server) serve(conn io.ReadWriter) {
	in := bufio.NewReader(io.LimitReader(conn, maxRequest))
	for {
		what, err := request(in)
		if err != nil {
			return
		}
		out := bufio.NewWriter(conn)
		code := refused
		if what == "get=1" {
			code = 0
			s.opts.State().write(out)
		}
		fmt.Fprintf(out, "errno=%d\n\n", code)
		if out.Flush() != nil {
			return
		}
	}
}

// request reads one: lines up to an empty one, of which the first says what is wanted.
func request(in *bufio.Reader) (first string, err error) {
	for n := 0; ; n++ {
		line, err := in.ReadString('\n')
		if err != nil {
			return "", err
		}
		line = strings.TrimSuffix(line, "\n")
		if n == 0 {
			first = line
		}
		if line == "" {
			return first, nil
		}
	}
}

func (st State) write(w io.Writer) {
	fmt.Fprintf(w, "listen_port=%d\n", st.Port)
	for _, p := range st.Peers {
		fmt.Fprintf(w, "public_key=%s\n", p.Key.Hex())
		if p.Endpoint.IsValid() {
			fmt.Fprintf(w, "endpoint=%s\n", p.Endpoint)
		}
		if !p.Handshake.IsZero() {
			fmt.Fprintf(w, "last_handshake_time_sec=%d\nlast_handshake_time_nsec=%d\n", p.Handshake.Unix(), p.Handshake.Nanosecond())
		}
		fmt.Fprintf(w, "tx_bytes=%d\nrx_bytes=%d\n", p.TxBytes, p.RxBytes)
		for _, prefix := range p.AllowedIPs {
			fmt.Fprintf(w, "allowed_ip=%s\n", prefix)
		}
		fmt.Fprint(w, "protocol_version=1\n")
	}
}

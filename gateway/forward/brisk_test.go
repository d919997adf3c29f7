package forward

import (
	"io"
	"net"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// ccEndpoint is an endpoint of which only what controls its window counts.
type ccEndpoint struct {
	tcpip.Endpoint
	info tcpip.TCPInfoOption
	set  []string
}

func (e *ccEndpoint) GetSockOpt(opt tcpip.GettableSocketOption) tcpip.Error {
	*opt.(*tcpip.TCPInfoOption) = e.info
	return nil
}

func (e *ccEndpoint) SetSockOpt(opt tcpip.SettableSocketOption) tcpip.Error {
	e.set = append(e.set, string(*opt.(*tcpip.CongestionControlOption)))
	return nil
}

// TestBriskLook: a flow's control changes where its path is brisk and its slow start has ended early, changes back where the path is long,
// and not otherwise.
func TestBriskLook(t *testing.T) {
	const fast, slow, initial = 4 << 20, 1 << 20, 0xffffffff // carried in 20 ms; the threshold before anything has ended
	info := func(rtt time.Duration, cwnd, thresh uint32) tcpip.TCPInfoOption {
		return tcpip.TCPInfoOption{RTT: rtt, SndCwnd: cwnd, SndSsthresh: thresh}
	}
	recovering := info(time.Millisecond, 300, 300)
	recovering.CcState = tcpip.SACKRecovery
	type step struct {
		carried int64
		info    tcpip.TCPInfoOption
		want    string // what is set; "" for nothing
	}
	ended := info(time.Millisecond, 300, 300)
	for name, steps := range map[string][]step{
		"brisk":            {{fast, ended, ""}, {fast, ended, "reno"}, {fast, ended, ""}, {slow, ended, ""}},
		"not fast":         {{slow, ended, ""}, {slow, ended, ""}, {slow, ended, ""}},
		"fast later":       {{slow, ended, ""}, {slow, ended, ""}, {fast, ended, "reno"}},
		"long":             {{fast, info(80*time.Millisecond, 300, 300), ""}, {fast, info(80*time.Millisecond, 300, 300), ""}},
		"still slow start": {{fast, info(time.Millisecond, 300, initial), ""}, {fast, info(time.Millisecond, 300, initial), ""}, {fast, ended, "reno"}},
		"something lost":   {{fast, recovering, ""}, {fast, recovering, ""}, {fast, ended, "reno"}},
		"long later": {{fast, ended, ""}, {fast, ended, "reno"}, {fast, info(slowTrip, 300, 300), ""}, {slow, info(slowTrip+1, 300, 300), "cubic"},
			{fast, info(slowTrip+1, 300, 300), ""}, {fast, ended, "reno"}},
	} {
		t.Run(name, func(t *testing.T) {
			ep := new(ccEndpoint)
			b, now, total, on := brisk{ep: ep}, time.Unix(1000, 0), int64(0), false
			for i, s := range steps {
				ep.info, ep.set = s.info, nil
				now, total = now.Add(20*time.Millisecond), total+s.carried
				got := b.look(total, now)
				if b.look(total+s.carried, now.Add(time.Millisecond)) != got {
					t.Errorf("step %d: another look at once says otherwise", i)
				}
				switch {
				case s.want == "" && len(ep.set) > 0 || s.want != "" && (len(ep.set) != 1 || ep.set[0] != s.want):
					t.Errorf("step %d: set %q, want %q", i, ep.set, s.want)
				case s.want != "":
					on = s.want == "reno"
				}
				if got != on {
					t.Errorf("step %d: brisk is %v", i, got)
				}
			}
		})
	}
}

// TestBriskKeepsTheStream: the stack takes the change in the midst of a download, again and again, and the job gets every byte in order.
func TestBriskKeepsTheStream(t *testing.T) {
	e := newEnv(t, Limits{})
	const size = 12 << 20
	c, err := e.dial(server(t, "tcp4", func(c *net.TCPConn) {
		_, _ = io.Copy(c, random(7, size))
		_, _ = c.Read(make([]byte, 1)) // until the job has all: the connection stays open
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want, buf, changed := random(7, size), make([]byte, 64<<10), 0
	expect := make([]byte, len(buf))
	for got := 0; got < size; {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(want, expect[:n]); err != nil || string(expect[:n]) != string(buf[:n]) {
			t.Fatalf("after %d bytes come others: %v", got, err)
		}
		if got/(1<<20) != (got+n)/(1<<20) {
			control := tcpip.CongestionControlOption([]string{"reno", "cubic"}[changed%2])
			for _, ep := range e.f.stack.RegisteredEndpoints() {
				if ep, ok := ep.(*tcp.Endpoint); ok && tcp.EndpointState(ep.State()) == tcp.StateEstablished {
					if terr := ep.SetSockOpt(&control); terr != nil {
						t.Fatal(terr)
					}
					changed++
				}
			}
		}
		got += n
	}
	if changed < 3 {
		t.Errorf("the control changed %d times", changed)
	}
}

package portmap

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/vishvananda/netlink"

	"github.com/culvertnet/culvert/internal/lab"
)

func TestMain(m *testing.M) {
	if protocols := os.Getenv(childEnv); protocols != "" {
		os.Exit(child(protocols))
	}
	_ = lab.Enter() // a test that needs it names the reason, through lab.Require
	if lo, err := netlink.LinkByName("lo"); err == nil {
		_ = netlink.LinkSetUp(lo) // it is down inside; a test that needs it says so
	}
	goleak.VerifyTestMain(m)
}

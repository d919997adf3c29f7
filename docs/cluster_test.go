package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"
)

// TestServerOfACluster: nats-server takes the file that scaling.md gives, and reads from it what Culvert rests on.
func TestServerOfACluster(t *testing.T) {
	text, err := os.ReadFile("scaling.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```\n(server_name: .*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("the page has no server's file")
	}
	conf := string(found[1])
	var names []string
	for _, placeholder := range []string{"UA…", "UB…"} {
		user, err := nkeys.CreateUser()
		if err != nil {
			t.Fatal(err)
		}
		public, err := user.PublicKey()
		if err != nil || strings.Count(conf, placeholder) != 1 {
			t.Fatalf("%s is there %d times, %v", placeholder, strings.Count(conf, placeholder), err)
		}
		conf = strings.ReplaceAll(conf, placeholder, public)
		names = append(names, public)
	}
	file := filepath.Join(t.TempDir(), "nats-server.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !o.JetStream || !o.SyncAlways || o.Cluster.Name != "culvert" || len(o.Routes) != 3 || o.ServerName != "n1" {
		t.Errorf("JetStream: %v, synced always: %v, cluster %q with %d routes, server %q", o.JetStream, o.SyncAlways, o.Cluster.Name, len(o.Routes), o.ServerName)
	}
	if len(o.Nkeys) != 2 {
		t.Fatalf("%d users", len(o.Nkeys))
	}
	for _, u := range o.Nkeys {
		votes := u.Permissions != nil && len(u.Permissions.Publish.Allow) == 3
		if votes != (u.Nkey == names[1]) || (u.Account.Name == "$SYS") != votes {
			t.Errorf("the user %s of %s may ask for elections: %v", u.Nkey, u.Account.Name, votes)
		}
	}
}

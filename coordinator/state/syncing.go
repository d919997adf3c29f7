package state

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	serversSubject = "$SYS.REQ.SERVER.PING.JSZ" // each server tells about its JetStream; as of nats-server 2.3 to 2.15
	serversCall    = 2 * time.Second            // for servers to answer
	maxServers     = 64                         // that are asked
)

// serverSays is what a server tells about its JetStream, as far as it matters here.
type serverSays struct {
	Server struct {
		Name string `json:"name"`
	} `json:"server"`
	Data struct {
		Config struct {
			SyncAlways bool `json:"sync_always"`
		} `json:"config"`
		Disabled bool `json:"disabled"`
	} `json:"data"`
}

// lookAtSyncing warns where servers acknowledge what a loss of power takes again. The user that may ask for elections has to be
// allowed to ask them.
func (e *election) lookAtSyncing(ctx context.Context) {
	answered, lax := e.servers(ctx, len(e.members))
	switch {
	case ctx.Err() != nil:
	case len(lax) > 0:
		e.log.Warn("nats servers acknowledge before they have synced: if several lose power at once, audit records and leases that were acknowledged are lost; set `sync_interval: always` in their jetstream block",
			"servers", strings.Join(lax, " "))
	case answered == 0:
		e.log.Warn("no nats server tells whether it syncs before it acknowledges: make sure that each has `sync_interval: always`, and let the user of state.elections publish to " + serversSubject)
	}
}

// servers asks those of the cluster how they sync, until so many have answered, and names those that do not always.
func (e *election) servers(ctx context.Context, enough int) (answered int, lax []string) {
	votes := e.panel.first(all)
	inbox := votes.NewInbox()
	answers := make(chan *nats.Msg, maxServers)
	sub, err := votes.ChanSubscribe(inbox, answers)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := votes.PublishRequest(serversSubject, inbox, nil); err != nil {
		return 0, nil
	}
	for over := time.After(serversCall); answered < min(enough, maxServers); {
		select {
		case m := <-answers:
			name, always, ok := parseServer(m.Data)
			if !ok {
				continue // without JetStream, or nobody hears this
			}
			if answered++; !always && !slices.Contains(lax, name) {
				lax = append(lax, name)
			}
		case <-over:
			return answered, lax
		case <-ctx.Done():
			return answered, lax
		}
	}
	return answered, lax
}

// parseServer reads a server's answer: its name, and whether it syncs before it acknowledges.
func parseServer(b []byte) (name string, always, ok bool) {
	const most = 1 << 20
	var s serverSays
	if len(b) > most || json.Unmarshal(b, &s) != nil || s.Server.Name == "" || s.Data.Disabled {
		return "", false, false
	}
	return s.Server.Name, s.Data.Config.SyncAlways, true
}

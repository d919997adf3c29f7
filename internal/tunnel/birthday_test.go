package tunnel

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// party is one side of a simulated pair: its birthday, its NAT, and what it has sent.
type party struct {
	birthday
	sit    situation
	range_ ports // that its NAT maps to
	sent   []time.Time
	probes []probe
	opened int // most sockets at one time
	opens  int // how often
	over   int
}

func newParty(lead bool, mapping wire.Mapping, in ports) *party {
	p := &party{birthday: birthday{lead: lead, crowd: &crowd{most: 1024}, shuffle: ports.shuffled}, range_: in}
	p.sit = situation{own: &mapper{mapping: mapping}, relayed: true, target: netip.MustParseAddrPort("203.0.113.9:4000")}
	return p
}

// pairing simulates two sides and the relay between them, which loses nothing and takes no time.
type pairing struct {
	a, b *party
	now  time.Time
	deaf bool // words are lost
}

func newPairing(a, b *party) *pairing { return &pairing{a: a, b: b, now: time.Unix(1_000_000, 0)} }

// run goes on for d, in steps of a timer that is never early.
func (p *pairing) run(d time.Duration) {
	for end := p.now.Add(d); p.now.Before(end); p.now = p.now.Add(10 * time.Millisecond) {
		p.step(p.a, p.b)
		p.step(p.b, p.a)
	}
}

func (p *pairing) step(from, to *party) {
	e := from.step(from.sit, p.now)
	if e.open > 0 {
		from.opened, from.opens = max(from.opened, e.open), from.opens+1
		mapped := ports{}
		if e.sample {
			mapped = estimate(drawn(sampled, int(from.range_.low), int(from.range_.high)))
		}
		from.birthday.opened(from.round, e.open, mapped, p.now)
	}
	for _, one := range e.probes {
		from.sent = append(from.sent, p.now)
		from.probes = append(from.probes, one)
	}
	if e.over {
		from.over++
		from.crowd.gone(from.crowd.sockets)
	}
	if e.say && !p.deaf {
		to.hear(from.word(from.sit.own), p.now)
	}
}

// fastest gives the most probes within any second.
func (p *party) fastest() int {
	most, from := 0, 0
	for to := range p.sent {
		for p.sent[to].Sub(p.sent[from]) > time.Second {
			from++
		}
		most = max(most, to-from+1)
	}
	return most
}

// Bounds that hold whatever happens.
func (p *party) bounded(t interface{ Fatalf(string, ...any) }) {
	if n := p.fastest(); n > 500 {
		t.Fatalf("%d probes within a second", n)
	}
	if len(p.sent) > birthdayProbes {
		t.Fatalf("%d probes in one session", len(p.sent))
	}
	if p.crowd.rounds < 0 || p.crowd.rounds > 1 {
		t.Fatalf("%d rounds of one session at once", p.crowd.rounds)
	}
	for _, one := range p.probes {
		if one.port < 1024 || one.socket < -1 || one.socket >= birthdaySockets {
			t.Fatalf("probe %+v", one)
		}
	}
}

func TestHardSideOpensAndEasySideTries(t *testing.T) {
	for _, hardLeads := range []bool{true, false} {
		hard, easy := newParty(hardLeads, wire.MappingHard, anyPort), newParty(!hardLeads, wire.MappingEasy, ports{})
		p := newPairing(hard, easy)
		if hardLeads {
			p.run(15 * time.Second)
		} else {
			p.a, p.b = easy, hard
			p.run(15 * time.Second)
		}
		hard.bounded(t)
		easy.bounded(t)
		if hard.opened != birthdaySockets || easy.opens > 0 {
			t.Errorf("hard leads %v: %d and %d sockets opened", hardLeads, hard.opened, easy.opened)
		}
		seen := map[int]int{}
		for _, one := range hard.probes {
			if one.port != 4000 {
				t.Fatalf("the hard side tries %+v", one)
			}
			seen[one.socket]++
		}
		if len(seen) != birthdaySockets || len(hard.probes) != hard.opens*birthdaySockets {
			t.Errorf("hard leads %v: %d of the sockets said %d words in %d rounds", hardLeads, len(seen), len(hard.probes), hard.opens)
		}
		if len(easy.probes) != birthdayProbes || hard.opens < 2 {
			t.Errorf("hard leads %v: the easy side tried %d ports in %d rounds of 15 s, want all in two", hardLeads, len(easy.probes), hard.opens)
		}
		if slices.ContainsFunc(easy.probes, func(one probe) bool { return one.socket != -1 }) {
			t.Error("the easy side opened another port")
		}
	}
}

// The easy side's first words go out after the hard side's, whose NAT would drop them else.
func TestHardSideHasAHeadStart(t *testing.T) {
	hard, easy := newParty(true, wire.MappingHard, anyPort), newParty(false, wire.MappingEasy, ports{})
	newPairing(hard, easy).run(5 * time.Second)
	if len(hard.sent) < birthdaySockets || len(easy.sent) == 0 || easy.sent[0].Before(hard.sent[birthdaySockets-1]) {
		t.Errorf("the first port is tried %v after the first word", easy.sent[0].Sub(hard.sent[0]))
	}
	if first := hard.sent[0].Sub(time.Unix(1_000_000, 0)); first < birthdayAfter {
		t.Errorf("the first probe goes out after %v, before there can be an ordinary path", first)
	}
}

// The guesses meet a socket as often as the birthday paradox promises: 98 of 100 times in the first try, nearly always in two.
func TestGuessesMeet(t *testing.T) {
	const sessions = 100
	first, both := 0, 0
	for range sessions {
		easy := newParty(false, wire.MappingEasy, ports{})
		newPairing(newParty(true, wire.MappingHard, anyPort), easy).run(15 * time.Second)
		hit := func(probes []probe) bool { // each try meets sockets of its own
			open := map[uint16]bool{}
			for _, port := range drawn(birthdaySockets, 1024, 65535) {
				open[port] = true
			}
			return slices.ContainsFunc(probes, func(one probe) bool { return open[one.port] })
		}
		one := hit(easy.probes[:birthdayTry])
		if one {
			first++
		}
		if one || hit(easy.probes[birthdayTry:]) {
			both++
		}
	}
	if first < 89 || both < 97 {
		t.Errorf("of %d sessions %d met in the first try, %d in two", sessions, first, both)
	}
}

// Two sides that map to a thousand ports each guess them from both ends.
func TestTwoNarrowSidesMeet(t *testing.T) {
	narrow := ports{30000, 30999}
	const sessions = 60
	met := 0
	for range sessions {
		a, b := newParty(true, wire.MappingHard, narrow), newParty(false, wire.MappingHard, narrow)
		newPairing(a, b).run(15 * time.Second)
		a.bounded(t)
		b.bounded(t)
		if len(a.probes) != birthdayProbes || len(b.probes) != birthdayProbes {
			t.Fatalf("%d and %d probes", len(a.probes), len(b.probes))
		}
		// from a's port p to b's port q, and back: both have to have guessed the other's
		type way struct{ own, other uint16 }
		ways := func(p *party) map[way]bool {
			out, flows := map[way]bool{}, map[probe]uint16{}
			for _, one := range p.probes {
				if flows[one] == 0 { // the NAT gives each flow a port
					flows[one] = uint16(30000 + rand.IntN(1000))
				}
				out[way{flows[one], one.port}] = true
			}
			return out
		}
		from := ways(b)
		for w := range ways(a) {
			if from[way{w.other, w.own}] {
				met++
				break
			}
		}
	}
	if met < sessions*80/100 {
		t.Errorf("%d of %d sessions met", met, sessions)
	}
}

// Where there is no hope nobody opens or tries anything, and words do not go on for ever.
func TestHopelessPairsRest(t *testing.T) {
	for name, p := range map[string]*pairing{
		"easy and easy":   newPairing(newParty(true, wire.MappingEasy, ports{}), newParty(false, wire.MappingEasy, ports{})),
		"hard and narrow": newPairing(newParty(true, wire.MappingHard, anyPort), newParty(false, wire.MappingHard, ports{30000, 30999})),
		"hard and hard":   newPairing(newParty(true, wire.MappingHard, anyPort), newParty(false, wire.MappingHard, anyPort)),
		"unknown":         newPairing(newParty(true, wire.MappingUnknown, ports{}), newParty(false, wire.MappingHard, anyPort)),
		"not heard":       {a: newParty(true, wire.MappingEasy, ports{}), b: newParty(false, wire.MappingHard, anyPort), now: time.Unix(1e6, 0), deaf: true},
	} {
		t.Run(name, func(t *testing.T) {
			p.run(10 * time.Minute)
			if len(p.a.probes)+len(p.b.probes) > 0 {
				t.Errorf("%d and %d probes", len(p.a.probes), len(p.b.probes))
			}
			if p.a.opens > 1 || p.b.opens > 1 {
				t.Errorf("%d and %d times sockets were opened", p.a.opens, p.b.opens)
			}
			if p.a.round > 12 {
				t.Errorf("%d rounds within ten minutes", p.a.round)
			}
			if p.a.crowd.rounds != 0 || p.b.crowd.rounds != 0 {
				t.Error("a place is still taken")
			}
		})
	}
}

// What was of no use is tried again when one side is behind something else.
func TestAnotherNATIsAnotherTry(t *testing.T) {
	a, b := newParty(true, wire.MappingEasy, ports{}), newParty(false, wire.MappingEasy, ports{})
	p := newPairing(a, b)
	p.run(10 * time.Second)
	a.sit.own = &mapper{mapping: wire.MappingHard}
	p.run(10 * time.Second)
	if a.opens == 0 || len(b.probes) == 0 {
		t.Errorf("%d times opened, %d probes", a.opens, len(b.probes))
	}
}

// A direct path ends everything at once.
func TestDirectPathEndsTheTry(t *testing.T) {
	a, b := newParty(true, wire.MappingHard, anyPort), newParty(false, wire.MappingEasy, ports{})
	p := newPairing(a, b)
	p.run(2300 * time.Millisecond)
	if a.phase != birthdayProbing || b.phase != birthdayProbing {
		t.Fatalf("phases %v and %v", a.phase, b.phase)
	}
	a.sit.relayed, b.sit.relayed = false, false
	before := len(a.probes) + len(b.probes)
	p.run(time.Minute)
	if len(a.probes)+len(b.probes) != before || a.over != 1 || b.over != 1 || a.crowd.rounds+b.crowd.rounds != 0 {
		t.Errorf("%d probes more; over %d and %d", len(a.probes)+len(b.probes)-before, a.over, b.over)
	}
}

// However a peer behaves, and whatever becomes of paths and NATs, a side keeps to its bounds, and sends nothing to where the peer
// has not been seen.
func TestBirthdayIsBounded(t *testing.T) {
	mappings := []wire.Mapping{wire.MappingUnknown, wire.MappingEasy, wire.MappingHard}
	rapid.Check(t, func(t *rapid.T) {
		p := newParty(rapid.Bool().Draw(t, "lead"), rapid.SampledFrom(mappings).Draw(t, "own"), ports{30000, 30999})
		p.range_ = rapid.SampledFrom([]ports{anyPort, {30000, 30999}}).Draw(t, "range")
		liar := newParty(!p.lead, wire.MappingHard, anyPort)
		pair := newPairing(p, liar)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0:
				p.sit.relayed = rapid.Bool().Draw(t, "relayed")
			case 1:
				p.sit.own = &mapper{mapping: rapid.SampledFrom(mappings).Draw(t, "now")}
			case 2:
				p.sit.target = rapid.SampledFrom([]netip.AddrPort{{}, netip.MustParseAddrPort("203.0.113.9:4000")}).Draw(t, "target")
			case 3:
				p.reset()
			default:
				low := rapid.Uint16().Draw(t, "low")
				word := nat.Behind{
					Mapping: rapid.SampledFrom(mappings[1:]).Draw(t, "theirs"), Ready: rapid.Bool().Draw(t, "ready"),
					Round: rapid.Uint8Range(0, 3).Draw(t, "round"), Low: low, High: rapid.Uint16Range(low, 65535).Draw(t, "high"),
				}
				if p.hear(word, pair.now) {
					p.crowd.gone(p.crowd.sockets)
				}
			}
			before := len(p.probes)
			for range rapid.IntRange(1, 300).Draw(t, "tenths of a tenth") {
				pair.step(p, liar)
				pair.now = pair.now.Add(10 * time.Millisecond)
			}
			if len(p.probes) > before && (!p.sit.relayed || !p.sit.target.IsValid()) {
				t.Fatalf("%d probes without a reason", len(p.probes)-before)
			}
		}
		p.bounded(t)
	})
}

func TestCrowdIsBounded(t *testing.T) {
	c := &crowd{most: 2*birthdaySockets + birthdayFewest - 1}
	for range 2 {
		if got, ok := c.enter(birthdaySockets); got != birthdaySockets || !ok {
			t.Fatalf("%d sockets, %v", got, ok)
		}
	}
	if _, ok := c.enter(birthdaySockets); ok {
		t.Error("there are sockets for a third")
	}
	for range 2 {
		if _, ok := c.enter(0); !ok {
			t.Error("no place for who needs no sockets")
		}
	}
	if _, ok := c.enter(0); ok {
		t.Error("a fifth round at once")
	}
	c.leave()
	c.gone(birthdaySockets)
	if got, ok := c.enter(birthdaySockets); got != birthdaySockets || !ok {
		t.Errorf("%d sockets, %v, after one has left", got, ok)
	}
}

// A side that says of itself one thing and then another, or whose network changes, in the middle of a try: nothing is sent that was not begun.
func TestWhatASideSaysMayChangeDuringATry(t *testing.T) {
	narrow := ports{40000, 40999}
	words := []nat.Behind{
		{Mapping: wire.MappingEasy}, {Mapping: wire.MappingHard}, {Mapping: wire.MappingHard, Low: narrow.low, High: narrow.high},
		{Mapping: wire.MappingEasy, Low: 1, High: 65535}, {Mapping: wire.MappingHard, Low: 7, High: 7},
	}
	owns := []*mapper{{mapping: wire.MappingEasy}, {mapping: wire.MappingHard}, {mapping: wire.MappingHard, ports: anyPort}, {}}
	rapid.Check(t, func(t *rapid.T) {
		p := newParty(rapid.Bool().Draw(t, "lead"), wire.MappingUnknown, narrow)
		peer := newParty(!p.lead, wire.MappingUnknown, narrow)
		pair := newPairing(p, peer)
		pair.deaf = true // the peer's words are ours to choose
		word := rapid.SampledFrom(words)
		own := rapid.SampledFrom(owns)
		p.sit.own = own.Draw(t, "own")
		for range rapid.IntRange(1, 12).Draw(t, "changes") {
			said := word.Draw(t, "word")
			said.Ready, said.Round = rapid.IntRange(0, 3).Draw(t, "ready") > 0, p.round
			if !p.lead && rapid.IntRange(0, 4).Draw(t, "anew") == 0 {
				said.Round = uint8(rapid.IntRange(0, 3).Draw(t, "round"))
			}
			if p.hear(said, pair.now) {
				p.crowd.gone(p.crowd.sockets)
			}
			if rapid.IntRange(0, 3).Draw(t, "moved") == 0 {
				p.sit.own = own.Draw(t, "own now")
			}
			pair.run(time.Duration(rapid.IntRange(1, 1500).Draw(t, "ms")) * time.Millisecond)
			for _, one := range p.probes {
				if one.socket >= p.opened {
					t.Fatalf("probe %+v, and %d sockets were ever open", one, p.opened)
				}
			}
		}
		p.bounded(t)
	})
}

// A leading side that begins one try after another does not have the other open sockets as fast as words arrive.
func TestTriesOfAHostileLeaderAreFew(t *testing.T) {
	for _, mapping := range []wire.Mapping{wire.MappingHard, wire.MappingEasy} {
		p := newParty(false, mapping, anyPort)
		pair := newPairing(newParty(true, wire.MappingUnknown, ports{}), p)
		pair.deaf = true
		theirs := wire.MappingEasy
		if mapping == wire.MappingEasy {
			theirs = wire.MappingHard
		}
		held := 0
		for i := range 60_000 { // ten minutes, a word every 10 ms
			if p.hear(nat.Behind{Mapping: theirs, Round: uint8(i)}, pair.now) {
				p.crowd.gone(p.crowd.sockets)
			}
			pair.run(10 * time.Millisecond)
			held += p.crowd.rounds
			if i == 400 && p.opens > 5 {
				t.Errorf("%s: sockets opened %d times within 4 s", mapping, p.opens)
			}
		}
		if p.opens > birthdayTries {
			t.Errorf("%s: sockets opened %d times", mapping, p.opens)
		}
		if most := int(birthdayTries*birthdayStage/(10*time.Millisecond)) + birthdayTries; held > most {
			t.Errorf("%s: one of few places held for %d of 60,000 ticks", mapping, held)
		}
	}
}

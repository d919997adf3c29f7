package relay

import (
	"testing"
	"time"
)

// window plays one window of a reader: full reads or not, and what each side sends. It gives what got through.
func (s *shares) play(now *int64, full bool, sides []used, runs []int, size int) (through []int) {
	*now += int64(shareWindow)
	s.read(*now, full)
	through = make([]int, len(sides))
	for i := range sides {
		for range runs[i] {
			if s.take(&sides[i], size) {
				through[i]++
			}
		}
	}
	return through
}

func TestSharesDoNothingWhileTheReaderKeepsUp(t *testing.T) {
	var s shares
	now, sides, runs := time.Now().UnixNano(), make([]used, 10), []int{1000, 1, 1, 1, 1, 1, 1, 1, 1, 1}
	for range 5 {
		for i, n := range s.play(&now, false, sides, runs, 1400) {
			if n != runs[i] {
				t.Fatalf("side %d gets %d of %d through", i, n, runs[i])
			}
		}
	}
}

func TestSharesCutWhoTakesMost(t *testing.T) {
	var s shares
	now, sides, runs := time.Now().UnixNano(), make([]used, 10), []int{1000, 5, 5, 5, 5, 5, 5, 5, 5, 5}
	s.play(&now, true, sides, runs, 1400)
	s.play(&now, true, sides, runs, 1400) // the window before was full from its first read on
	got := s.play(&now, true, sides, runs, 1400)
	if mean := 1045 / 10; got[0] > shareFactor*mean+1 || got[0] < mean {
		t.Errorf("the one that floods gets %d through", got[0])
	}
	for i, n := range got[1:] {
		if n != 5 {
			t.Errorf("side %d gets %d of 5 through", i+1, n)
		}
	}
	s.play(&now, false, sides, runs, 1400)
	if got := s.play(&now, false, sides, runs, 1400); got[0] != 1000 {
		t.Errorf("it is still cut once the reader keeps up: %d", got[0])
	}
}

// Equal sides are not cut, and neither is one that is alone, nor anyone where strangers are to blame.
func TestSharesCutNobodyElse(t *testing.T) {
	for name, tt := range map[string]struct {
		runs     []int
		stranger int
	}{
		"equal":     {[]int{100, 100, 100}, 0},
		"alone":     {[]int{1000}, 0},
		"strangers": {[]int{1000, 1}, 2000},
	} {
		var s shares
		now, sides := time.Now().UnixNano(), make([]used, len(tt.runs))
		for range 5 {
			got := s.play(&now, true, sides, tt.runs, 1400)
			for range tt.stranger {
				s.stranger(100)
			}
			for i, n := range got {
				if n != tt.runs[i] {
					t.Fatalf("%s: side %d gets %d of %d through", name, i, n, tt.runs[i])
				}
			}
		}
	}
}

// Whatever is cut, a side always gets one run a window.
func TestSharesStarveNobody(t *testing.T) {
	var s shares
	now, sides, runs := time.Now().UnixNano(), make([]used, 100), make([]int, 100)
	for i := range runs {
		runs[i] = 1
	}
	for range 5 {
		for i, n := range s.play(&now, true, sides, runs, 64000) {
			if n != 1 {
				t.Fatalf("side %d gets nothing", i)
			}
		}
		s.work = 1 // as if they had sent next to nothing, so that the limit is below a run
	}
}

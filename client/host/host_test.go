package host

import (
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestOptions(t *testing.T) {
	o := Options{}
	if err := o.Validate(); err != nil || o.MTU != DefaultMTU || o.Logger == nil {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	for name, o := range map[string]Options{
		"long name":    {Name: "abcdefghijklmnop"},
		"pattern":      {Name: "culvert%d"},
		"path":         {Name: "a/b"},
		"space":        {Name: "a b"},
		"dot":          {Name: "."},
		"MTU too low":  {MTU: 1279},
		"MTU too high": {MTU: 65536},
	} {
		if err := o.Validate(); problem.CodeOf(err) != problem.Usage {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

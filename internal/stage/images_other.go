//go:build unix && !linux

package stage

import "github.com/culvertnet/culvert/internal/lab"

// Off Linux there are no images.

func (s *Stage) gatewayProgram(_ string, p lab.Program) (lab.Program, error) { return p, nil }
func (s *Stage) coordinatorProgram(p lab.Program) (lab.Program, error)       { return p, nil }

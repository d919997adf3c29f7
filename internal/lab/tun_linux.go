package lab

import "sync"

// TUN reports why programs on a lab's hosts cannot make TUN devices, and links cannot have delay or loss; or nil.
var TUN = sync.OnceValue(func() error {
	if err := Available(); err != nil {
		return err
	}
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	defer ns.close()
	tap, err := openTAP(end{ns: ns, name: "probe"}, true)
	if err != nil {
		return err
	}
	return tap.Close()
})

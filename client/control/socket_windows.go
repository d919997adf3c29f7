package control

import "os"

// ownedAndPrivate relies on the folder lying in the user's profile, whose access list keeps others out.
func ownedAndPrivate(os.FileInfo, int) bool { return true }

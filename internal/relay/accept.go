package relay

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// acceptSocket does a server's part of the opening handshake (RFC 6455, section 4.2). Where the request is not what a
// relay serves it answers it and gives an error.
func acceptSocket(w http.ResponseWriter, r *http.Request) (*socket, error) {
	key := r.Header.Get("Sec-WebSocket-Key")
	raw, err := base64.StdEncoding.DecodeString(key)
	switch {
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		return refuse(w, http.StatusMethodNotAllowed, "a relay takes GET only")
	case !headerHas(r.Header, "Connection", "upgrade") || !headerHas(r.Header, "Upgrade", "websocket"):
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		return refuse(w, http.StatusUpgradeRequired, "a relay speaks WebSocket only")
	case r.Header.Get("Sec-WebSocket-Version") != "13":
		w.Header().Set("Sec-WebSocket-Version", "13")
		return refuse(w, http.StatusUpgradeRequired, "version 13 of WebSocket is spoken here")
	case err != nil || len(raw) != 16:
		return refuse(w, http.StatusBadRequest, "Sec-WebSocket-Key is not 16 bytes of base64")
	case !headerHas(r.Header, "Sec-WebSocket-Protocol", Protocol):
		return refuse(w, http.StatusBadRequest, "the subprotocol "+Protocol+" is missing")
	case r.Header.Get("Origin") != "":
		return refuse(w, http.StatusForbidden, "no page in a browser has business with a relay")
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return refuse(w, http.StatusUpgradeRequired, "a WebSocket needs HTTP/1.1")
	}
	shortQueue(conn)
	const answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Protocol: " + Protocol + "\r\nSec-WebSocket-Accept: %s\r\n\r\n"
	_ = conn.SetDeadline(time.Now().Add(BindTimeout))
	if _, err := fmt.Fprintf(conn, answer, acceptKey(key)); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("complete the websocket handshake: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	early, _ := rw.Reader.Peek(rw.Reader.Buffered())
	var in io.Reader = conn
	if len(early) > 0 {
		in = io.MultiReader(bytes.NewReader(early), conn)
	}
	return newSocket(conn, bufio.NewReaderSize(in, acceptBuffer), false).over(conn), nil
}

// acceptBuffer holds headers only: messages are read past it. There may be many thousands of them.
const acceptBuffer = 128

func refuse(w http.ResponseWriter, status int, reason string) (*socket, error) {
	http.Error(w, reason, status)
	return nil, errors.New(reason)
}

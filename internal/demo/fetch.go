//go:build unix

package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// fetchURL is a program of the job: it goes through the proxy that `culvert exec` names, also for loopback addresses,
// which programs usually leave out.
func fetchURL(target string) error {
	proxy := os.Getenv("ALL_PROXY")
	if proxy == "" {
		return errors.New("ALL_PROXY is not set: not run by culvert exec")
	}
	through, err := url.Parse(proxy)
	if err != nil {
		return fmt.Errorf("read ALL_PROXY: %w", err)
	}
	transport := &http.Transport{Proxy: http.ProxyURL(through), DisableKeepAlives: true}
	body, err := get(&http.Client{Timeout: 5 * time.Second, Transport: transport}, target)
	if err != nil {
		return err
	}
	fmt.Print(body)
	return nil
}

// get fetches a small page.
func get(client *http.Client, target string) (string, error) {
	resp, err := client.Get(target)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answers %s", target, resp.Status)
	}
	return string(body), nil
}

// cause is the last part of a network error's text, or the system's word for it.
func cause(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	text := err.Error()
	if i := strings.LastIndex(text, ": "); i >= 0 {
		return text[i+2:]
	}
	return text
}

package config

import (
	"fmt"
	"math"
	"reflect"
	"strings"
)

// Limits bound what the coordinator does for whoever asks, a second; ten times as much may come at once. Zero stands for
// what the programs choose.
type Limits struct {
	// Address is how many requests a second one address may send (IPv6: one /64); default 100, because runners share NATs.
	Address float64 `yaml:"address"`
	// Owner is how many joins a second one owner's jobs may make; default 500.
	Owner float64 `yaml:"owner"`
	// Repository is how many joins a second one repository's jobs may make; default 200.
	Repository float64 `yaml:"repository"`
	// Total is how many joins a second are taken in all; default 2000.
	Total float64 `yaml:"total"`
	// Connections is how many may be open at once; default 32768.
	Connections int `yaml:"connections"`
	// AddressConnections is how many one address may hold open; default 4096. Trusted proxies may hold as many as they like.
	AddressConnections int `yaml:"address_connections"`
	// ConnectionRate is how many one address may open a second, and twenty times that at once; default 200, because a TLS handshake costs
	// a server more than it costs a stranger.
	ConnectionRate float64 `yaml:"connection_rate"`
}

func (r *reader) requestLimits(l Limits) Limits {
	v := reflect.ValueOf(l)
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch n := v.Field(i).Convert(reflect.TypeFor[float64]()).Float(); {
		case n < 0:
			r.fail("$.limits."+name, fmt.Sprintf("%s is below zero", name), "leave it out for the default")
		case math.IsNaN(n) || math.IsInf(n, 0):
			r.fail("$.limits."+name, fmt.Sprintf("%s is no number that can be counted to", name), "leave it out for the default")
		}
	}
	return l
}

# Culvert: make demo shows it, make test checks it, make bench measures it. Only Go, make and git are needed to build.

GO          ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
ACTIONLINT  ?= github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
ACT         ?= github.com/nektos/act@v0.2.89
PEBBLE      ?= github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1
NODE        ?= 24
# What makes Debian packages.
NFPM_MODULE ?= github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.0
NFPM        ?= bin/tools/nfpm
FUZZTIME    ?= 10s
BENCHTIME   ?= 1x
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

BINARIES := bin/culvert-coordinator bin/culvert-gateway bin/culvert
PACKAGES  = $(shell $(GO) list ./... | grep -v '/internal/e2e')

# Static programs: no C library, no paths of this machine.
export CGO_ENABLED = 0
GOBUILD = $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: build demo test check action unit e2e images act matrix cluster neighbours kernel power bench charts terraform cross dist packages pin pinned reproducible fuzz clean tools-test tools-bench FORCE

build: $(BINARIES)

bin/culvert-coordinator: FORCE
	@$(GOBUILD) -o $@ ./coordinator
bin/culvert-gateway: FORCE
	@$(GOBUILD) -o $@ ./gateway
bin/culvert: FORCE
	@$(GOBUILD) -o $@ ./client

# The main job on one machine, no root needed.
demo: build
	@$(GO) build -trimpath -o bin/demo ./internal/demo
	@bin/demo -bin bin

# Everything that is checked before a change goes in. What cannot run here is named; with CI=true nothing may be skipped.
test: tools-test check action unit e2e

check:
	@unformatted="$$(gofmt -l $$(git ls-files '*.go'))"; \
	if [ -n "$$unformatted" ]; then echo "not gofmt-ed: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	GOOS=darwin $(GO) build ./client/... ./internal/demo/...
	GOOS=windows $(GO) build ./client/...
	@if $(GO) run $(STATICCHECK) -version >/dev/null 2>&1; then \
		echo "$(GO) run $(STATICCHECK) ./..."; $(GO) run $(STATICCHECK) ./...; \
	elif [ "$$CI" = true ]; then echo "staticcheck cannot be fetched, and CI must not skip"; exit 1; \
	else echo "skipped: staticcheck cannot be fetched ($(STATICCHECK))"; fi
	@$(call go-tool,actionlint,$(ACTIONLINT))
	$(GO) test -count=1 ./internal/snippets

# The race detector needs a C compiler. By default it sleeps for a second at the end of every program, and scripts run hundreds. Vet has run in check.
UNIT = -vet=off -p 2 -timeout 10m
unit: export GORACE = atexit_sleep_ms=50
unit: build
	@if command -v gcc >/dev/null || command -v cc >/dev/null; then \
		echo "$(GO) test -race ./..."; \
		CGO_ENABLED=1 CULVERT_E2E_BIN=$(CURDIR)/bin $(GO) test -race $(UNIT) $(PACKAGES); \
	elif [ "$$CI" = true ]; then echo "the race detector needs a C compiler, and CI must not skip"; exit 1; \
	else echo "skipped: the race detector, which needs a C compiler"; \
		CULVERT_E2E_BIN=$(CURDIR)/bin $(GO) test $(UNIT) $(PACKAGES); fi

# The action's steps, each as the runner starts it.
action:
	@if command -v node >/dev/null; then echo "node --test action/test/"; node --test --test-reporter=dot action/test/; \
	elif [ "$$CI" = true ]; then echo "the action's tests need node, and CI must not skip"; exit 1; \
	else echo "skipped: the action's tests, which need node"; fi

# The real programs in namespaces, alone on the machine because they are timed; those that mostly wait come last, together.
e2e: build
	CULVERT_E2E_BIN=$(CURDIR)/bin $(GO) test -vet=off -count=1 -timeout 10m ./internal/e2e/...

# The images as the Dockerfile makes them, for both architectures, and the gateway's tests against its image, and compose.yaml: 5 minutes. The
# client runs in a container, too. `make test` runs the first of these tests.
IMAGE_TESTS = ^Test(Images|Compose|ProxyInAContainer|TunMode|ProxyMode|AnotherRepository|FixedEgress|OutsideTheGrant|AlwaysDenied|HostileClient|Overlapping|Gateway|Pinned|Tokens?|IssuerAway|CoordinatorKilled|ServersStop|ChangedPolicy|NothingUndocumented)
images: tools-test build
	@$(call want,podman-compose,podman-compose netavark aardvark-dns)
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_GATEWAY=image $(GO) test -count=1 -timeout 20m -run '$(IMAGE_TESTS)' -v ./internal/e2e

# Workflows under act, twenty jobs at once, containers of a job with Docker itself, and what the action costs beyond `culvert up`.
act: tools-test build
	@$(unpack-docker)
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_ACT=all $(GO) test -count=1 -timeout 10m -run '^Test(Workflow|DockerOfAJob)' \
		-bench '^BenchmarkAction' -benchtime 1x -v ./internal/e2e

# Every kind of network against every other, 81 pairs on links with delay: about 10 minutes. Writes the tables of docs/paths.md.
matrix: tools-test build
	@rm -f bin/matrix.json
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_MATRIX=$(CURDIR)/bin/matrix.json \
		$(GO) test -count=1 -timeout 60m -run '^TestMatrix' -v ./internal/e2e

# Three coordinators on a cluster of three nats-servers, each in a namespace of its own; they are killed, frozen and cut off, one after the other: a quarter of an hour.
cluster: build
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_CLUSTER=1 $(GO) test -count=1 -timeout 45m -run '^TestCluster' -v ./internal/e2e/scale
	CULVERT_E2E_CLUSTER=1 $(GO) test -count=1 -timeout 5m -run '^TestElections$$' ./coordinator/state

# The last release's programs with these, in every mixture, and an upgrade while a job runs: three minutes. LAST names any commit in place of
# the last release before this commit.
LAST ?= $(shell git describe --tags --abbrev=0 --match 'v[0-9]*.[0-9]*.[0-9]*' HEAD^ 2>/dev/null)
neighbours: tools-test build
	@if [ "$$(git rev-parse --is-shallow-repository)" = true ]; then echo "the last release is not to be found in a shallow clone: git fetch --unshallow --tags"; exit 1; fi
	@if [ -z "$(LAST)" ]; then echo "there has been no release: nothing to run these programs against"; exit 0; fi; \
	set -e; dir="$$(mktemp -d)"; trap 'rm -rf "$$dir"' EXIT; chmod 755 "$$dir"; mkdir "$$dir/src" "$$dir/bin"; \
	echo "$(LAST), $$(git rev-parse --short '$(LAST)^{commit}'), with this tree"; \
	git archive '$(LAST)' | tar -x -C "$$dir/src"; \
	for p in coordinator:culvert-coordinator gateway:culvert-gateway client:culvert; do \
		(cd "$$dir/src" && $(GO) build -trimpath -buildvcs=false -ldflags "-X main.version=$(LAST)" -o "$$dir/bin/$${p#*:}" "./$${p%:*}"); done; \
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_NEIGHBOUR="$$dir/bin" \
		$(GO) test -count=1 -timeout 15m -run '^Test(Neighbours|Upgrade)$$' -v ./internal/e2e

# Mode kernel on a kernel that has WireGuard, Debian's for clouds, in a virtual machine: a minute, and 40 MB to fetch the first time.
# For x86-64 alone.
KERNEL := bin/tools/kernel
kernel: build
	@$(call want,qemu-system-x86_64 depmod wg,qemu-system-x86 kmod wireguard-tools)
	@$(get-node)
	@$(unpack-kernel)
	@$(GOBUILD) -o $(KERNEL)/guest ./internal/e2e/guest
	@$(GO) test -c -o $(KERNEL)/kernel.test ./client/kernel
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_KERNEL=$(CURDIR)/$(KERNEL) \
		$(GO) test -count=1 -timeout 10m -run '^TestKernel' -v ./internal/e2e

# A coordinator with embedded state, then the three nats-servers of another one, in a virtual machine whose plug is pulled again and again while jobs join, on a
# disk that loses what was not flushed: four minutes, and 40 MB to fetch the first time. For x86-64 alone.
power: build
	@$(call want,qemu-system-x86_64 depmod mkfs.ext4,qemu-system-x86 kmod e2fsprogs)
	@$(unpack-kernel)
	@$(GOBUILD) -o $(KERNEL)/guest ./internal/e2e/guest
	CULVERT_E2E_BIN=$(CURDIR)/bin CULVERT_E2E_KERNEL=$(CURDIR)/$(KERNEL) \
		$(GO) test -count=1 -timeout 20m -run '^TestPower' -v ./internal/e2e/scale

# Throughput, memory and time to the first byte, in Go's benchmark format.
bench: tools-bench build
	@CULVERT_E2E_BIN=$(CURDIR)/bin $(GO) test -run '^$$' -bench . -benchtime $(BENCHTIME) -timeout 25m ./internal/e2e
	@CULVERT_E2E_BIN=$(CURDIR)/bin $(GO) test -run '^$$' -bench . -benchtime $(BENCHTIME) -timeout 20m ./internal/e2e/scale

# The charts, against the API's types and the table of what Culvert needs. A module of its own, with Kubernetes' dependencies.
charts:
	cd deploy/helm/check && $(GO) vet . && $(GO) test -count=1 .

# The examples for clouds, with HCL's parser, against the same table.
terraform:
	cd deploy/terraform/check && $(GO) vet . && $(GO) test -count=1 .

# The client for the systems that no test runs on, its tests included.
cross:
	GOOS=darwin $(GO) vet ./client/...
	GOOS=windows $(GO) vet ./client/...

# Every fuzzer for FUZZTIME each.
fuzz:
	@for pkg in $$($(GO) list ./...); do \
		for name in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$name"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5s $$pkg || exit 1; \
		done; \
	done

clean:
	rm -rf bin dist

# A release's files, the same bytes wherever they are built from the same sources with the same Go: nothing in them depends on the
# commit, so that the commit can hold their digests. The client as the action wants it, the others with licence and units, and as
# Debian packages; of each what it is made of. The charts, for the images of this version.
CLIENTS := linux-amd64 linux-arm64 darwin-amd64 darwin-arm64 windows-amd64
SERVERS := linux-amd64 linux-arm64
RELEASE  = $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
ROOTED  := tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX
dist: $(if $(filter bin/%,$(NFPM)),$(NFPM))
	@case "$(VERSION)" in [0-9]*.[0-9]*.[0-9]*) ;; *) echo "say which: make dist VERSION=1.2.3"; exit 1;; esac
	@rm -rf dist && mkdir dist
	@$(GO) build -o bin/tools/sbom ./internal/sbom
	@set -e; sums=; for p in $(CLIENTS); do \
		GOOS=$${p%-*} GOARCH=$${p#*-} $(RELEASE) -o dist/culvert ./client; \
		sums="$$sums$${sums:+, }\"$$p\": \"$$(sha256sum dist/culvert | cut -d' ' -f1)\""; \
		bin/tools/sbom culvert $(VERSION) dist/culvert > dist/culvert-$$p.cdx.json; \
		gzip -n -9 < dist/culvert > dist/culvert-$$p.gz; rm dist/culvert; \
	done; echo "{\"version\": \"$(VERSION)\", \"sha256\": {$$sums}}" > dist/release.json
	@set -e; for p in $(SERVERS); do for program in coordinator gateway; do \
		mkdir -p dist/tree; cp LICENSE deploy/systemd/*.service dist/tree/; \
		GOOS=$${p%-*} GOARCH=$${p#*-} $(RELEASE) -o dist/tree/culvert-$$program ./$$program; \
		bin/tools/sbom culvert-$$program $(VERSION) dist/tree/culvert-$$program > dist/culvert-$$program-$$p.cdx.json; \
		$(ROOTED) -C dist/tree -cf - . | gzip -n -9 > dist/culvert-$$program-$$p.tar.gz; \
		sed -i 's|/usr/local/bin|/usr/bin|g' dist/tree/*.service; \
		TREE=dist/tree ARCH=$${p#*-} VERSION=$(VERSION) $(NFPM) package -f deploy/deb/$$program.yaml -p deb \
			-t dist/culvert-$${program}_$(VERSION)_$${p#*-}.deb >/dev/null; \
		rm -r dist/tree; \
	done; done
	@set -e; for program in coordinator gateway; do chart=dist/tree/culvert-$$program; mkdir dist/tree; cp -r deploy/helm/culvert-$$program dist/tree/; \
		sed -i 's/^version: .*/version: $(VERSION)/; s/^appVersion: .*/appVersion: "$(VERSION)"/' $$chart/Chart.yaml; \
		$(ROOTED) -C dist/tree -cf - culvert-$$program | gzip -n -9 > dist/culvert-$$program-chart.tgz; rm -r dist/tree; \
	done
	@$(GO) list -deps -f '{{with .Module}}{{.Path}} {{.Version}}{{end}}' ./client ./coordinator ./gateway | sort -u > dist/modules.txt
	@cp deploy/vex.json dist/culvert.vex.json
	@cd dist && sha256sum -- * > SHA256SUMS && cat SHA256SUMS

bin/tools/nfpm:
	@$(call go-tool,nfpm,$(NFPM_MODULE))

# The Debian packages of a trial release, unpacked and looked at; nothing is installed.
packages:
	$(MAKE) -s dist VERSION=0.0.0 CLIENTS=linux-amd64
	CULVERT_DIST=$(CURDIR)/dist $(GO) test -count=1 -v ./deploy/deb

# Before tagging: make dist pin VERSION=1.2.3, and commit. The release workflow then builds anew and stops where anything differs.
pin:
	cp dist/release.json action/release.json
pinned:
	@cmp dist/release.json action/release.json || { echo "action/release.json is not what these sources give: make dist pin VERSION=$(VERSION)"; exit 1; }

# Two builds without a common cache, from two folders, give the same bytes.
reproducible: bin/tools/nfpm
	@set -e; dir="$$(mktemp -d)"; trap 'chmod -R u+w "$$dir"; rm -rf "$$dir"' EXIT; commit="$$(git rev-parse HEAD)"; for n in 1 2; do \
		mkdir "$$dir/$$n"; git archive "$$commit" | tar -x -C "$$dir/$$n"; \
		GOCACHE="$$dir/cache$$n" $(MAKE) -s -C "$$dir/$$n" dist NFPM=$(CURDIR)/bin/tools/nfpm VERSION=0.0.0 CLIENTS=linux-amd64 SERVERS=linux-amd64 > "$$dir/sums$$n"; \
	done; diff "$$dir/sums1" "$$dir/sums2" && cat "$$dir/sums1"

# What the tests use of the distribution. Only root on Debian has it installed; elsewhere the tests name what they miss.
tools-test:
	@$(call want,curl gcc tinyproxy,curl gcc libc6-dev tinyproxy-bin)
	@$(call want,miniupnpd,miniupnpd-nftables)
	@$(call want,dbus-daemon,dbus-daemon)
	@$(call want,psql initdb,postgresql)
	@$(call want,sudo,sudo)
	@$(call want,podman runc busybox /usr/lib/podman/netavark /usr/lib/podman/aardvark-dns,podman runc netavark aardvark-dns busybox-static)
	@$(unpack-resolved)
	@$(call go-tool,act,$(ACT))
	@$(call go-tool,pebble,$(PEBBLE))
	@$(get-node)
tools-bench:
	@$(call want,iperf3,iperf3)

# systemd-resolved, which a test runs in namespaces of its own, is unpacked and not installed: its package takes over the
# machine's resolv.conf.
RESOLVED := bin/tools/resolved/lib/systemd/systemd-resolved
export CULVERT_TEST_RESOLVED = $(if $(wildcard /lib/systemd/systemd-resolved),,$(CURDIR)/$(RESOLVED))
unpack-resolved = if [ ! -e /lib/systemd/systemd-resolved ] && [ ! -e $(RESOLVED) ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "unpacking systemd-resolved"; mkdir -p bin/tools/resolved; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libsystemd-shared && \
			cd bin/tools && apt-get download -qq systemd-resolved && dpkg-deb -x systemd-resolved_*.deb resolved; } >/dev/null 2>&1 \
			|| echo "could not unpack systemd-resolved"; \
	fi

# Docker is unpacked and not installed, so that no daemon of it is started but the test's own.
DOCKER := bin/tools/docker/usr/bin/docker
export CULVERT_TEST_DOCKER = $(CURDIR)/$(DOCKER)
unpack-docker = if [ ! -e $(DOCKER) ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "unpacking Docker"; mkdir -p bin/tools/docker; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iptables libdevmapper1.02.1 runc && \
			cd bin/tools && apt-get download -qq docker.io containerd tini && \
			for d in docker.io_*.deb containerd_*.deb tini_*.deb; do dpkg-deb -x "$$d" docker && rm "$$d"; done; } >/dev/null 2>&1 \
			|| echo "could not unpack Docker"; \
	fi

# A kernel is unpacked and not installed: the machine keeps its own.
unpack-kernel = mkdir -p $(KERNEL); if [ ! -e $(KERNEL)/boot ] && command -v apt-get >/dev/null; then \
		echo "unpacking a kernel"; cd $(KERNEL) && { \
			image="$$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *//p' | head -1)" && apt-get download -qq "$$image" && \
			dpkg-deb -x "$$image"_*.deb . && rm "$$image"_*.deb && depmod -b . "$$(ls lib/modules)"; } >/dev/null 2>&1 \
			|| echo "could not unpack a kernel"; \
	fi

# What plays GitHub's runner, and its Node, which is newer than Debian's, and a CA; in bin/tools.
export CULVERT_TEST_ACTIONLINT = $(CURDIR)/bin/tools/actionlint
export CULVERT_TEST_ACT = $(CURDIR)/bin/tools/act
export CULVERT_TEST_PEBBLE = $(CURDIR)/bin/tools/pebble
export CULVERT_TEST_NODE = $(CURDIR)/bin/tools/node$(NODE)/node_modules/node-linux-$(NODE_ARCH)/bin/node
NODE_ARCH := $(if $(filter aarch64 arm64,$(shell uname -m)),arm64,x64)
go-tool = if [ ! -e bin/tools/$(1) ]; then echo "fetching $(2)"; \
	GOBIN=$(CURDIR)/bin/tools $(GO) install $(2) 2>/dev/null || echo "could not fetch $(2)"; fi
get-node = if [ ! -e $(CULVERT_TEST_NODE) ] && command -v npm >/dev/null; then echo "fetching node $(NODE)"; \
	npm install --silent --no-audit --no-fund --prefix bin/tools/node$(NODE) node-linux-$(NODE_ARCH)@$(NODE) >/dev/null 2>&1 \
		|| echo "could not fetch node $(NODE)"; fi

# want PROGRAMS,PACKAGES installs the packages where one of the programs is missing and that is possible.
want = PATH="$$PATH:$$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -1)"; missing=; for p in $(1); do command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $(2)"; \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2); } >/dev/null \
				|| echo "could not install $(2)"; \
		else echo "missing:$$missing (Debian: apt-get install $(2)); what needs it is skipped"; fi; \
	fi

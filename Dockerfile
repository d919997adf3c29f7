# One file, two images: docker build --target gateway . and docker build --target coordinator .
# Static programs on an empty base: no shell, no package manager, uid 65532, nothing that has to be written but the coordinator's state.

FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG VERSION=dev
ARG TARGETOS TARGETARCH
# For builds without a network, the folder of a module proxy; see docs/operations.md.
ARG GOPROXY GOFLAGS GOSUMDB
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY coordinator coordinator
COPY gateway gateway
COPY client client
COPY internal internal
RUN mkdir -p /out/state && \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" \
    -o /out/ ./coordinator ./gateway && \
    mv /out/coordinator /out/culvert-coordinator && mv /out/gateway /out/culvert-gateway

FROM scratch AS gateway
ARG VERSION=dev
LABEL org.opencontainers.image.title="culvert-gateway" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.description="Carries CI jobs into a private network, each as far as its grant" \
      org.opencontainers.image.source="https://github.com/culvertnet/culvert" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/culvert-gateway /culvert-gateway
USER 65532:65532
EXPOSE 51820/udp
ENV CULVERT_METRICS=127.0.0.1:9091
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["/culvert-gateway", "health"]
ENTRYPOINT ["/culvert-gateway"]
CMD ["run"]

FROM scratch AS coordinator
ARG VERSION=dev
LABEL org.opencontainers.image.title="culvert-coordinator" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.description="Verifies CI jobs' tokens, decides by policy and introduces them to gateways" \
      org.opencontainers.image.source="https://github.com/culvertnet/culvert" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/culvert-coordinator /culvert-coordinator
COPY --from=build --chown=65532:65532 /out/state /var/lib/culvert
USER 65532:65532
VOLUME /var/lib/culvert
EXPOSE 443/tcp 3478/udp 3479/udp
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["/culvert-coordinator", "health"]
ENTRYPOINT ["/culvert-coordinator"]
CMD ["serve", "--config", "/etc/culvert/culvert.yaml"]

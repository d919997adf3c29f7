// Package nft makes tables of nftables that are gone when the process is: each belongs to a socket, and the kernel removes it with
// that (NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h, since Linux 5.12). Nobody else may change them meanwhile.
package nft

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The lock behind the firewall: from aa-agents-proxy.slice only packets to the
 * proxy's own ends leave, and no socket is made that is neither TCP nor UDP. The
 * packet filter runs after NAT, so it sees where a packet really goes; with the
 * rules of the firewall gone it sees the origin's address and drops.
 *
 * What is not understood is dropped. With an empty table of ends everything is.
 *
 * Reports of multicast membership are the kernel's own packets and belong to no
 * socket, and name a group that the program chose: so joining is refused.
 */
#include "shared.bpf.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define EPROTONOSUPPORT 93
#define LOOPBACK_IFINDEX 1
#define IPV4_FRAGMENT 0x3fff /* more fragments, or an offset */

#define REFUSE 0
#define PASS 1

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, AA_MAX_ENDS);
	__type(key, struct aa_end);
	__type(value, __u8);
} aa_ends SEC(".maps");

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 total_len;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__u32 source;
	__u32 destination;
};

struct ipv6 {
	__u32 version_class_flow;
	__u16 payload_len;
	__u8 next_header;
	__u8 hop_limit;
	__u32 source[4];
	__u32 destination[4];
};

struct ports {
	__u16 source;
	__u16 destination;
};

/* Reads what decides into `key`; returns why the packet cannot even be looked up, or 0. */
static __always_inline __u8 aa_dissect(struct __sk_buff *skb, struct aa_tally_key *key)
{
	struct ports ports;
	__u32 header;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 ip;

		if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
			return AA_REFUSED_HEADER;
		key->family = AF_INET;
		key->addr[0] = ip.destination;
		key->protocol = ip.protocol;
		if (ip.version_ihl != 0x45 || ip.fragment & bpf_htons(IPV4_FRAGMENT))
			return AA_REFUSED_FRAGMENT;
		header = sizeof(ip);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 ip;

		if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
			return AA_REFUSED_HEADER;
		if ((bpf_ntohl(ip.version_class_flow) >> 28) != 6)
			return AA_REFUSED_HEADER;
		key->family = AF_INET6;
		__builtin_memcpy(key->addr, ip.destination, sizeof(key->addr));
		key->protocol = ip.next_header;
		header = sizeof(ip);
	} else {
		return AA_REFUSED_HEADER;
	}
	/* In v6 this is also what an extension header, a fragment's among them, ends in. */
	if (key->protocol != IPPROTO_TCP && key->protocol != IPPROTO_UDP)
		return AA_REFUSED_HEADER;
	if (bpf_skb_load_bytes(skb, header, &ports, sizeof(ports)))
		return AA_REFUSED_HEADER;
	key->port = bpf_ntohs(ports.destination);
	return AA_NOT_REFUSED;
}

static __always_inline __u64 aa_run_of_packet(struct __sk_buff *skb)
{
	const struct aa_config *config = aa_configuration();
	__u64 id;

	if (!config || !config->slice)
		return 0;
	id = bpf_skb_ancestor_cgroup_id(skb, config->level + 2);
	return id ? id : bpf_skb_cgroup_id(skb);
}

/* Records a refusal: counted always, told in the ring now and then. */
static __always_inline struct aa_net *aa_refusal(const struct aa_tally_key *key,
						 struct aa_tally **tally)
{
	struct aa_count *count = aa_counted(AA_REFUSED);
	struct aa_net *record;
	__u64 total;

	if (!count)
		return NULL;
	total = aa_count_up(key, count, tally);
	if (!total || !*tally)
		return NULL;
	record = aa_reserve_net(key->cgroup);
	if (!record)
		return NULL; /* the tally has it */
	aa_begin(&record->head, AA_REFUSED, sizeof(*record), key->cgroup);
	record->key = *key;
	record->total = total;
	(*tally)->told = record->head.time;
	return record;
}

SEC("cgroup_skb/egress")
int aa_egress(struct __sk_buff *skb)
{
	struct aa_tally_key key = {};
	struct aa_tally *tally = NULL;
	struct aa_net *record;

	key.reason = aa_dissect(skb, &key);
	if (key.reason == AA_NOT_REFUSED) {
		struct aa_end end = {
			.port = key.port,
			.protocol = key.protocol,
			.family = key.family,
		};

		__builtin_memcpy(end.addr, key.addr, sizeof(end.addr));
		if (!bpf_map_lookup_elem(&aa_ends, &end))
			key.reason = AA_REFUSED_END;
		/* A socket bound to a real interface can send 127.0.0.1 out to the wire. */
		else if (skb->ifindex != LOOPBACK_IFINDEX)
			key.reason = AA_REFUSED_INTERFACE;
		else
			return PASS;
	}
	key.cgroup = aa_run_of_packet(skb);
	record = aa_refusal(&key, &tally);
	if (record) {
		aa_nobody(&record->head);
		bpf_ringbuf_submit(record, 0);
	}
	return REFUSE;
}

SEC("cgroup/sock_create")
int aa_sock_create(struct bpf_sock *sk)
{
	const struct aa_config *config = aa_configuration();
	struct aa_tally_key key = {};
	struct aa_tally *tally = NULL;
	struct aa_net *record;

	key.type = sk->type;
	key.protocol = sk->protocol;
	key.family = sk->family;
	if (key.type == SOCK_STREAM && key.protocol == IPPROTO_TCP)
		return PASS;
	if (key.type == SOCK_DGRAM && key.protocol == IPPROTO_UDP)
		return PASS;

	key.reason = AA_REFUSED_SOCKET;
	if (config) {
		key.cgroup = aa_current_run(config);
		record = aa_refusal(&key, &tally);
		if (record) {
			aa_who(&record->head, config);
			bpf_ringbuf_submit(record, 0);
		}
	}
	/* Programs that prefer multipath TCP fall back to TCP on this error, not on EPERM. */
	if (key.protocol == IPPROTO_MPTCP)
		bpf_set_retval(-EPROTONOSUPPORT);
	return REFUSE;
}

/* Everything that makes the kernel join a group: linux/in.h and linux/in6.h. */
#define SOL_IP 0
#define SOL_IPV6 41
#define IP_ADD_MEMBERSHIP 35
#define IP_ADD_SOURCE_MEMBERSHIP 39
#define IP_MSFILTER 41
#define IPV6_ADD_MEMBERSHIP 20
#define IPV6_JOIN_ANYCAST 27
#define MCAST_JOIN_GROUP 42
#define MCAST_JOIN_SOURCE_GROUP 46
#define MCAST_MSFILTER 48
/* More than this the kernel does not copy for a program; 0 tells it to use the caller's own. */
#define OPTLEN_COPIED 4096

static __always_inline int aa_joins(__u32 level, __u32 option)
{
	if (level != SOL_IP && level != SOL_IPV6)
		return 0;
	if (option == MCAST_JOIN_GROUP || option == MCAST_JOIN_SOURCE_GROUP ||
	    option == MCAST_MSFILTER)
		return 1;
	if (level == SOL_IP)
		return option == IP_ADD_MEMBERSHIP || option == IP_ADD_SOURCE_MEMBERSHIP ||
		       option == IP_MSFILTER;
	return option == IPV6_ADD_MEMBERSHIP || option == IPV6_JOIN_ANYCAST;
}

SEC("cgroup/setsockopt")
int aa_setsockopt(struct bpf_sockopt *ctx)
{
	const struct aa_config *config;
	struct aa_tally_key key = {};
	struct aa_tally *tally = NULL;
	struct aa_net *record;

	if (!aa_joins(ctx->level, ctx->optname)) {
		if (ctx->optlen > OPTLEN_COPIED)
			ctx->optlen = 0;
		return PASS;
	}
	config = aa_configuration();
	if (config) {
		key.reason = AA_REFUSED_JOIN;
		key.family = ctx->level == SOL_IP ? AF_INET : AF_INET6;
		key.cgroup = aa_current_run(config);
		record = aa_refusal(&key, &tally);
		if (record) {
			aa_who(&record->head, config);
			bpf_ringbuf_submit(record, 0);
		}
	}
	return REFUSE;
}

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the probes at TLS libraries tell. They have a ring and tables of their own, so
 * that nothing an agent does to them takes room from the guard. aa/ebpf/tls/records.py
 * holds the same layout, and a test compares the two.
 */
#ifndef AA_TLS_EVENTS_H
#define AA_TLS_EVENTS_H

#include "events.h"

#define AA_TLS_RING_BYTES (1 << 21)
#define AA_TLS_MAX_SESSIONS 4096
#define AA_TLS_MAX_CALLS 4096
#define AA_TLS_MAX_RUNS 512

/* Plaintext of one call that is looked at: one TLS record. */
#define AA_TLS_DATA_MAX 16384
/* Room in the ring is taken in these steps. */
#define AA_TLS_DATA_SMALL 512
#define AA_TLS_DATA_MEDIUM 4096

/* Bytes of an HTTP/1 head that are looked at, from the beginning of a session and from
 * each call that begins like a request. */
#define AA_TLS_HEAD_MAX 16384

/* Records of one run in one second. What is more is counted as held back. */
#define AA_TLS_RATE 2000

enum aa_tls_kind {
	AA_TLS_DATA = 1, /* the agent sent something */
	AA_TLS_END = 2,  /* the library let go of a session */
};

enum aa_tls_flags {
	AA_TLS_FROM_START = 1 << 0, /* the session's beginning was seen */
	AA_TLS_HTTP2 = 1 << 1,      /* it began with the preface of HTTP/2 */
	AA_TLS_ENDED = 1 << 2,
	AA_TLS_UNREAD = 1 << 3,     /* of one record: the program's memory could not be read */
};

/* A session is an object of the library in a process; `tgid` as the whole machine counts. */
struct aa_tls_key {
	__u64 object;
	__u32 tgid;
	__u32 pad;
};

struct aa_tls_session {
	__u64 born; /* CLOCK_BOOTTIME, ns; tells sessions at one address apart */
	__u64 out;  /* bytes of plaintext so far */
	__u64 in;
	__u32 flags;
	__s32 fd; /* that the library was given; -1 when it was given none */
	__u32 head_left;
	__u32 library;
};

struct aa_tls_data {
	struct aa_head head;
	struct aa_tls_key key;
	__u64 born;
	__u64 offset; /* bytes that were sent before these */
	__u64 in;     /* bytes that were received so far */
	__u32 len;      /* bytes sent by this call */
	__u32 captured; /* of them, how many are in `data` */
	__u32 library;  /* the loader's number for it */
	__u16 peer_family; /* 0: not known */
	__u16 peer_port;
	__u32 peer_addr[4];
	char data[];
};

/* All only grow. */
struct aa_tls_count {
	__u64 events;    /* put into the ring */
	__u64 lost;      /* did not fit into it */
	__u64 held_back; /* were over the rate of a run */
	__u64 pad;
};

#endif

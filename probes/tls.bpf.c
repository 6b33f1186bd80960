// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * What governed programs send through TLS libraries, before it is encrypted. Observes
 * and refuses nothing: a program can patch a probe out of its own memory.
 *
 * A probe sits in a file and is met by every process that uses the file, so the first
 * thing each program does is to return for what is not below aa-agents.slice. What was
 * received is counted and never looked at; of what was sent, userspace gets the
 * beginnings, where the heads of requests are.
 */
#include <linux/ptrace.h>
#include "shared.bpf.h"
#include "open.bpf.h"
#include "tls_events.h"

#define MODE_FORMAT 0170000
#define MODE_SOCKET 0140000
#define SECOND_NS 1000000000ULL

char LICENSE[] SEC("license") = "GPL";

/* A call that has not returned yet. */
struct aa_tls_call {
	__u64 object;
	__u64 buffer;
	__u64 done; /* where the library writes how many bytes it took; for the _ex calls */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_TLS_MAX_CALLS);
	__type(key, __u64);
	__type(value, struct aa_tls_call);
} aa_tls_calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_TLS_MAX_SESSIONS);
	__type(key, struct aa_tls_key);
	__type(value, struct aa_tls_session);
} aa_tls_sessions SEC(".maps");

struct aa_tls_rate {
	__u64 since;
	__u64 told;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_TLS_MAX_RUNS);
	__type(key, __u64);
	__type(value, struct aa_tls_rate);
} aa_tls_rates SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, AA_TLS_RING_BYTES);
} aa_tls_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct aa_tls_count);
} aa_tls_counts SEC(".maps");

static __always_inline int aa_tls_watched(void)
{
	const struct aa_config *config = aa_configuration();

	return config && aa_governed(config);
}

static __always_inline struct aa_tls_key aa_tls_key_of(__u64 object)
{
	struct aa_tls_key key = {
		.object = object,
		.tgid = bpf_get_current_pid_tgid() >> 32,
	};

	return key;
}

static __always_inline void aa_tls_begin(void *ctx, __u64 object, __u32 flags, int fd)
{
	struct aa_tls_key key = aa_tls_key_of(object);
	struct aa_tls_session fresh = {
		.born = bpf_ktime_get_boot_ns(),
		.flags = flags,
		.fd = fd,
		.head_left = AA_TLS_HEAD_MAX,
		.library = bpf_get_attach_cookie(ctx),
	};

	bpf_map_update_elem(&aa_tls_sessions, &key, &fresh, BPF_ANY);
}

/* The session of an object; one that was not seen to begin is made here. */
static __always_inline struct aa_tls_session *aa_tls_find(void *ctx, __u64 object)
{
	struct aa_tls_key key = aa_tls_key_of(object);
	struct aa_tls_session *session;

	session = bpf_map_lookup_elem(&aa_tls_sessions, &key);
	if (session)
		return session;
	aa_tls_begin(ctx, object, 0, -1);
	return bpf_map_lookup_elem(&aa_tls_sessions, &key);
}

/* True while the run is within its rate. */
static __always_inline int aa_tls_may_tell(__u64 run)
{
	struct aa_tls_rate *rate, fresh = {};
	__u64 now = bpf_ktime_get_boot_ns();

	rate = bpf_map_lookup_elem(&aa_tls_rates, &run);
	if (!rate) {
		bpf_map_update_elem(&aa_tls_rates, &run, &fresh, BPF_NOEXIST);
		rate = bpf_map_lookup_elem(&aa_tls_rates, &run);
		if (!rate)
			return 0;
	}
	if (now - rate->since > SECOND_NS) {
		rate->since = now;
		rate->told = 0;
	}
	return __sync_fetch_and_add(&rate->told, 1) < AA_TLS_RATE;
}

struct aa_tls_end {
	__u32 addr[4];
	__u16 port;
	__u16 family;
};

/*
 * The other end of the socket behind a descriptor: what the program asked to connect
 * to, for a redirection does not change the socket. The index is looked at as it is
 * when the session is used.
 */
static __always_inline void aa_tls_peer(struct aa_tls_end *end, int fd)
{
	struct file *file = aa_open_file(fd);
	struct socket *socket;
	struct sock *sk;
	__u16 family;

	if (!file || (BPF_CORE_READ(file, f_inode, i_mode) & MODE_FORMAT) != MODE_SOCKET)
		return;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (family == AF_INET6)
		BPF_CORE_READ_INTO(&end->addr, sk, __sk_common.skc_v6_daddr.in6_u.u6_addr32);
	else if (family == AF_INET)
		end->addr[0] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	else
		return;
	end->port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	end->family = end->port ? family : 0;
}

static __always_inline void aa_tls_describe(struct aa_tls_data *record, __u8 kind,
					    const struct aa_config *config, __u64 object,
					    const struct aa_tls_session *session)
{
	aa_begin(&record->head, kind, sizeof(*record), aa_current_run(config));
	record->head.flags = session->flags;
	aa_who(&record->head, config);
	record->key = aa_tls_key_of(object);
	record->born = session->born;
	record->offset = session->out;
	record->in = session->in;
	record->len = 0;
	record->captured = 0;
	record->library = session->library;
	record->peer_family = 0;
	record->peer_port = 0;
	__builtin_memset(record->peer_addr, 0, sizeof(record->peer_addr));
}

#define AA_TLS_ROOM(step) (sizeof(struct aa_tls_data) + (step))

/*
 * Copies at most `room` bytes of a program's memory; `room` is a power of two. Masked
 * and not compared: older verifiers lose what a comparison said about a copy.
 */
static __always_inline long aa_tls_copy(void *to, __u32 room, __u32 wanted, __u64 from)
{
	if (wanted >= room)
		return bpf_probe_read_user(to, room, (void *)from);
	barrier_var(wanted);
	wanted &= room - 1;
	return bpf_probe_read_user(to, wanted, (void *)from);
}

static __always_inline void aa_tls_fill(struct aa_tls_data *record,
					const struct aa_config *config, __u64 object,
					struct aa_tls_session *session,
					const struct aa_tls_end *peer, __u64 buffer, __u32 len,
					__u32 wanted, __u32 step)
{
	aa_tls_describe(record, AA_TLS_DATA, config, object, session);
	record->peer_family = peer->family;
	record->peer_port = peer->port;
	__builtin_memcpy(record->peer_addr, peer->addr, sizeof(peer->addr));
	record->len = len;
	if (aa_tls_copy(record->data, step, wanted, buffer))
		record->head.flags |= AA_TLS_UNREAD;
	else
		record->captured = wanted < step ? wanted : step;
}

/* Each size is a place of its own: the verifier wants to know it. */
#define AA_TLS_TELL(step)                                                                    \
	do {                                                                                 \
		struct aa_tls_data *record =                                                 \
			bpf_ringbuf_reserve(&aa_tls_events, AA_TLS_ROOM(step), 0);           \
		if (!record)                                                                 \
			goto lost;                                                           \
		aa_tls_fill(record, config, object, session, &peer, buffer, len, wanted,     \
			    step);                                                           \
		bpf_ringbuf_submit(record, 0);                                               \
	} while (0)

/* How many bytes of what was just sent are worth a look. Keeps book in the session. */
static __always_inline __u32 aa_tls_worth(struct aa_tls_session *session, __u64 buffer, __u32 len)
{
	unsigned char start[8] = {};
	__u32 worth, i;

	aa_tls_copy(start, sizeof(start), len, buffer);
	if (!session->out && start[0] == 'P' && start[1] == 'R' && start[2] == 'I' &&
	    start[3] == ' ' && start[4] == '*')
		session->flags |= AA_TLS_HTTP2;
	if (session->flags & AA_TLS_HTTP2)
		return len < AA_TLS_DATA_MAX ? len : AA_TLS_DATA_MAX;
	/* Three capital letters may begin a request. */
	for (i = 0; i < 3; i++)
		if (start[i] < 'A' || start[i] > 'Z')
			break;
	if (i == 3)
		session->head_left = AA_TLS_HEAD_MAX;
	worth = len < session->head_left ? len : session->head_left;
	session->head_left -= worth;
	return worth < AA_TLS_DATA_MAX ? worth : AA_TLS_DATA_MAX;
}

static __always_inline void aa_tls_sent(void *ctx, __u64 object, __u64 buffer, __u32 len)
{
	const struct aa_config *config = aa_configuration();
	struct aa_tls_session *session = aa_tls_find(ctx, object);
	struct aa_tls_end peer = {};
	struct aa_tls_count *count;
	__u32 zero = 0, wanted;

	count = bpf_map_lookup_elem(&aa_tls_counts, &zero);
	if (!config || !session || !count)
		return;
	session->flags &= ~AA_TLS_ENDED;
	wanted = aa_tls_worth(session, buffer, len);
	if (!wanted)
		goto out;
	if (!aa_tls_may_tell(aa_current_run(config))) {
		aa_add(&count->held_back);
		goto out;
	}
	if (session->fd >= 0)
		aa_tls_peer(&peer, session->fd);
	if (wanted <= AA_TLS_DATA_SMALL)
		AA_TLS_TELL(AA_TLS_DATA_SMALL);
	else if (wanted <= AA_TLS_DATA_MEDIUM)
		AA_TLS_TELL(AA_TLS_DATA_MEDIUM);
	else
		AA_TLS_TELL(AA_TLS_DATA_MAX);
	aa_add(&count->events);
	goto out;
lost:
	aa_add(&count->lost);
out:
	session->out += len;
}

/* The call that returns now. An inner call of the same thread took its place and is it. */
static __always_inline int aa_tls_returned(struct aa_tls_call *call)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct aa_tls_call *found = bpf_map_lookup_elem(&aa_tls_calls, &thread);

	if (!found)
		return 0;
	*call = *found;
	bpf_map_delete_elem(&aa_tls_calls, &thread);
	return 1;
}

/* What an _ex call says that it did; 0 when it failed. */
static __always_inline __u32 aa_tls_done(const struct aa_tls_call *call, int result)
{
	__u64 done = 0;

	if (result != 1 || bpf_probe_read_user(&done, sizeof(done), (void *)call->done))
		return 0;
	return done > 0x7fffffff ? 0 : done;
}

static __always_inline void aa_tls_received(void *ctx, __u64 object, __u32 len)
{
	struct aa_tls_session *session = aa_tls_find(ctx, object);

	if (!session)
		return;
	session->flags &= ~AA_TLS_ENDED;
	session->in += len;
}

/* Reading and writing begin alike: (object, buffer, length, and for _ex: how much was done). */
SEC("uprobe")
int aa_tls_enter(struct pt_regs *ctx)
{
	struct aa_tls_call call = {};
	__u64 thread;

	if (!aa_tls_watched())
		return 0;
	thread = bpf_get_current_pid_tgid();
	call.object = PT_REGS_PARM1(ctx);
	call.buffer = PT_REGS_PARM2(ctx);
	call.done = PT_REGS_PARM4(ctx);
	bpf_map_update_elem(&aa_tls_calls, &thread, &call, BPF_ANY);
	return 0;
}

SEC("uretprobe")
int aa_tls_written(struct pt_regs *ctx)
{
	struct aa_tls_call call;
	int result = PT_REGS_RC(ctx);

	if (aa_tls_returned(&call) && result > 0)
		aa_tls_sent(ctx, call.object, call.buffer, result);
	return 0;
}

SEC("uretprobe")
int aa_tls_written_ex(struct pt_regs *ctx)
{
	struct aa_tls_call call;
	__u32 done;

	if (!aa_tls_returned(&call))
		return 0;
	done = aa_tls_done(&call, PT_REGS_RC(ctx));
	if (done)
		aa_tls_sent(ctx, call.object, call.buffer, done);
	return 0;
}

SEC("uretprobe")
int aa_tls_read(struct pt_regs *ctx)
{
	struct aa_tls_call call;
	int result = PT_REGS_RC(ctx);

	if (aa_tls_returned(&call) && result > 0)
		aa_tls_received(ctx, call.object, result);
	return 0;
}

SEC("uretprobe")
int aa_tls_read_ex(struct pt_regs *ctx)
{
	struct aa_tls_call call;
	__u32 done;

	if (!aa_tls_returned(&call))
		return 0;
	done = aa_tls_done(&call, PT_REGS_RC(ctx));
	if (done)
		aa_tls_received(ctx, call.object, done);
	return 0;
}

/* SSL_new returns the object. */
SEC("uretprobe")
int aa_tls_new(struct pt_regs *ctx)
{
	__u64 object = PT_REGS_RC(ctx);

	if (object && aa_tls_watched())
		aa_tls_begin(ctx, object, AA_TLS_FROM_START, -1);
	return 0;
}

/* gnutls_handshake: may be called many times for one session. */
SEC("uprobe")
int aa_tls_handshake(struct pt_regs *ctx)
{
	struct aa_tls_session *session;
	struct aa_tls_key key;

	if (!aa_tls_watched())
		return 0;
	key = aa_tls_key_of(PT_REGS_PARM1(ctx));
	session = bpf_map_lookup_elem(&aa_tls_sessions, &key);
	if (!session || session->flags & AA_TLS_ENDED)
		aa_tls_begin(ctx, key.object, AA_TLS_FROM_START, -1);
	return 0;
}

/* (object, descriptor): before anything is sent, so a session that is not known begins here. */
SEC("uprobe")
int aa_tls_set_fd(struct pt_regs *ctx)
{
	struct aa_tls_session *session;
	struct aa_tls_key key;
	int fd = PT_REGS_PARM2(ctx);

	if (!aa_tls_watched())
		return 0;
	key = aa_tls_key_of(PT_REGS_PARM1(ctx));
	session = bpf_map_lookup_elem(&aa_tls_sessions, &key);
	if (!session || session->flags & AA_TLS_ENDED)
		aa_tls_begin(ctx, key.object, AA_TLS_FROM_START, fd);
	else
		session->fd = fd;
	return 0;
}

/* SSL_free counts references down: a session that is used again lives on. */
SEC("uprobe")
int aa_tls_free(struct pt_regs *ctx)
{
	const struct aa_config *config = aa_configuration();
	struct aa_tls_session *session;
	struct aa_tls_count *count;
	struct aa_tls_data *record;
	struct aa_tls_key key;
	__u32 zero = 0;

	if (!config || !aa_governed(config))
		return 0;
	key = aa_tls_key_of(PT_REGS_PARM1(ctx));
	session = bpf_map_lookup_elem(&aa_tls_sessions, &key);
	count = bpf_map_lookup_elem(&aa_tls_counts, &zero);
	if (!session || !count || session->flags & AA_TLS_ENDED)
		return 0;
	session->flags |= AA_TLS_ENDED;
	if (!session->out)
		return 0;
	if (!aa_tls_may_tell(aa_current_run(config))) {
		aa_add(&count->held_back);
		return 0;
	}
	record = bpf_ringbuf_reserve(&aa_tls_events, sizeof(*record), 0);
	if (!record) {
		aa_add(&count->lost);
		return 0;
	}
	aa_tls_describe(record, AA_TLS_END, config, key.object, session);
	bpf_ringbuf_submit(record, 0);
	aa_add(&count->events);
	return 0;
}

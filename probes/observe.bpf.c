// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * What governed runs do: exec, exit, and where they ask to connect to. Refuses
 * nothing. Programs on tracepoints run for every task of the machine, so the first
 * thing each does is to return for what is not below aa-agents.slice; the cgroup
 * programs are attached to that slice and cost others nothing.
 */
#include "shared.bpf.h"

#define TCP_SYN_SENT 2
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define SOCK_STREAM 1
#define SIGNAL_GROUP_EXIT 0x4

char LICENSE[] SEC("license") = "GPL";

/*
 * A walk from a file up to the root of its mount namespace. It lies in a map and not on
 * the stack, where the verifier would follow its numbers from step to step and, on
 * older kernels, never see an end.
 */
struct aa_walk {
	__u64 dentry;
	__u64 mount;
	__u32 start; /* where in the record's data */
	__u32 len;
	__u32 complete;
	__u32 pad;
};

/* An exec record is put together here and then copied, so that a short one takes
 * little of the ring. Tracepoints are not preempted by each other on one CPU. */
struct aa_draft {
	struct aa_walk walk;
	struct aa_exec exec;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct aa_draft);
} aa_drafts SEC(".maps");

static __always_inline struct aa_draft *aa_draft_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&aa_drafts, &zero);
}

/* Processes whose end is told already: two last threads can end at the same time. */
struct aa_process {
	__u64 started;
	__u32 tgid;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct aa_process);
	__type(value, __u8);
} aa_ended SEC(".maps");

/* The configuration if this program is the one to speak and the task is governed. */
static __always_inline const struct aa_config *aa_observes(void)
{
	const struct aa_config *config = aa_configuration();

	if (!config || !aa_governed(config) || config->generation != aa_generation)
		return NULL;
	return config;
}

/* One step: writes one name, or goes from a mount to what it is mounted on. */
static long aa_step_up(__u32 step, void *unused)
{
	struct aa_draft *draft = aa_draft_here();
	struct dentry *dentry, *parent;
	struct mount *mount, *above;
	struct aa_walk *walk;
	__u32 at;
	long written;

	if (!draft)
		return 1;
	walk = &draft->walk;
	dentry = (void *)walk->dentry;
	mount = (void *)walk->mount;
	if (dentry == BPF_CORE_READ(mount, mnt.mnt_root)) {
		above = BPF_CORE_READ(mount, mnt_parent);
		if (above == mount) {
			walk->complete = 1;
			return 1;
		}
		walk->dentry = (__u64)BPF_CORE_READ(mount, mnt_mountpoint);
		walk->mount = (__u64)above;
		return 0;
	}
	at = walk->start + walk->len;
	if (walk->len > AA_PATH_MAX - AA_NAME_MAX || at > AA_EXEC_DATA_MAX - AA_NAME_MAX)
		return 1;
	written = bpf_probe_read_kernel_str(&draft->exec.data[at], AA_NAME_MAX,
					    BPF_CORE_READ(dentry, d_name.name));
	if (written <= 0)
		return 1;
	walk->len += written;
	parent = BPF_CORE_READ(dentry, d_parent);
	if (parent == dentry) { /* below no mount: a memfd, an unlinked tree */
		walk->complete = 1;
		return 1;
	}
	walk->dentry = (__u64)parent;
	return 0;
}

/*
 * The parts of an exec record. Each is a global function, which the verifier judges by
 * itself: as one program their bounds multiply, and older kernels give up.
 *
 * This one writes the components of a path into the draft from `start` on, from the leaf
 * to the root of the mount namespace; a chroot does not shorten it. Returns their length
 * and sets `cut` in the draft's flags when the bounds were met first.
 */
__noinline __u32 aa_components(__u64 address, __u32 start, __u32 cut)
{
	const struct path *path = (void *)address;
	struct aa_draft *draft = aa_draft_here();

	if (!draft)
		return 0;
	draft->walk.dentry = (__u64)BPF_CORE_READ(path, dentry);
	draft->walk.mount =
		(__u64)BPF_CORE_READ(path, mnt) - bpf_core_field_offset(struct mount, mnt);
	draft->walk.start = start;
	draft->walk.len = 0;
	draft->walk.complete = 0;
	bpf_loop(AA_PATH_DEPTH, aa_step_up, NULL, 0);
	if (!draft->walk.complete)
		draft->exec.head.flags |= cut;
	return draft->walk.len;
}

/* Writes the name that was asked for to the beginning of the data. Returns its length with its NUL. */
__noinline __u32 aa_filename(__u64 address)
{
	struct aa_draft *draft = aa_draft_here();
	long read;

	if (!draft)
		return 0;
	read = bpf_probe_read_kernel_str(draft->exec.data, AA_FILENAME_MAX, (void *)address);
	if (read < 1) {
		draft->exec.data[0] = 0;
		return 1;
	}
	if (read == AA_FILENAME_MAX)
		draft->exec.head.flags |= AA_FILENAME_CUT;
	return read;
}

/* Writes the arguments to the data from `start` on. Returns how many bytes that took. */
__noinline __u32 aa_arguments(__u64 address, __u64 len, __u32 start)
{
	struct aa_draft *draft = aa_draft_here();

	if (!draft || start > AA_EXEC_DATA_MAX - AA_ARGV_MAX)
		return 0;
	if (len > AA_ARGV_MAX) {
		len = AA_ARGV_MAX;
		draft->exec.head.flags |= AA_ARGV_CUT;
	}
	if (bpf_probe_read_user(&draft->exec.data[start], len, (void *)address)) {
		draft->exec.head.flags |= AA_ARGV_UNREAD;
		return 0;
	}
	return len;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(aa_on_exec, struct task_struct *task, pid_t old_pid, struct linux_binprm *bprm)
{
	const struct aa_config *config = aa_observes();
	struct aa_count *count = aa_counted(AA_EXEC);
	struct aa_draft *draft = aa_draft_here();
	struct aa_exec *record;
	struct fs_struct *fs;
	struct file *file;
	__u64 start, end;
	__u32 len;

	if (!config || !count || !draft)
		return 0;
	record = &draft->exec;
	aa_begin(&record->head, AA_EXEC, 0, aa_current_run(config));
	aa_who(&record->head, config);
	file = BPF_CORE_READ(bprm, file);
	record->inode = BPF_CORE_READ(file, f_inode, i_ino);
	record->device = BPF_CORE_READ(file, f_inode, i_sb, s_dev);
	record->argc = BPF_CORE_READ(bprm, argc);

	len = aa_filename((__u64)BPF_CORE_READ(bprm, filename));
	record->filename_len = len;
	record->exe_len = aa_components((__u64)&file->f_path, len, AA_EXE_CUT);
	len += record->exe_len;
	record->cwd_len = 0;
	if (record->data[0] != '/') {
		fs = BPF_CORE_READ(task, fs);
		record->cwd_len = aa_components((__u64)&fs->pwd, len, AA_CWD_CUT);
		len += record->cwd_len;
	}
	start = BPF_CORE_READ(task, mm, arg_start);
	end = BPF_CORE_READ(task, mm, arg_end);
	record->argv_len = aa_arguments(start, end - start, len);
	len += record->argv_len;

	len += offsetof(struct aa_exec, data);
	if (len > sizeof(*record))
		len = sizeof(*record); /* cannot be: each part above has its bound */
	record->head.size = len;
	if (bpf_ringbuf_output(&aa_events, record, len, 0))
		aa_add(&count->lost);
	else
		aa_add(&count->events);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(aa_on_exit, struct task_struct *task)
{
	const struct aa_config *config = aa_observes();
	struct aa_count *count = aa_counted(AA_EXIT);
	struct task_struct *leader;
	struct aa_process process = {};
	struct aa_exit *record;
	__u8 yes = 1;

	if (!config || !count)
		return 0;
	/* The last thread has counted itself out already when it comes here. */
	if (BPF_CORE_READ(task, signal, live.counter) != 0)
		return 0;
	leader = BPF_CORE_READ(task, group_leader);
	process.started = BPF_CORE_READ(leader, start_boottime);
	process.tgid = BPF_CORE_READ(task, tgid);
	if (bpf_map_update_elem(&aa_ended, &process, &yes, BPF_NOEXIST))
		return 0;

	record = bpf_ringbuf_reserve(&aa_events, sizeof(*record), 0);
	if (!record) {
		aa_add(&count->lost);
		return 0;
	}
	aa_begin(&record->head, AA_EXIT, sizeof(*record), aa_current_run(config));
	aa_who(&record->head, config);
	record->age_ns = record->head.time - process.started;
	record->status = BPF_CORE_READ(task, signal, flags) & SIGNAL_GROUP_EXIT
				 ? BPF_CORE_READ(task, signal, group_exit_code)
				 : BPF_CORE_READ(leader, exit_code);
	record->pad = 0;
	aa_add(&count->events);
	bpf_ringbuf_submit(record, 0);
	return 0;
}

static __always_inline void aa_tell_connect(const struct aa_config *config,
					    const struct aa_tally_key *key, struct aa_count *count)
{
	struct aa_net *record = aa_reserve_net(key->cgroup);

	if (!record) {
		aa_add(&count->lost);
		return;
	}
	aa_begin(&record->head, AA_CONNECT, sizeof(*record), key->cgroup);
	aa_who(&record->head, config);
	record->key = *key;
	record->total = 0;
	aa_add(&count->events);
	bpf_ringbuf_submit(record, 0);
}

/* A run that uses a socket made outside: the cgroup programs go by the socket's
 * own cgroup and do not see it. */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(aa_on_foreign_connect, struct sock *sk, int old_state, int new_state)
{
	const struct aa_config *config;
	struct aa_tally_key key = {};
	struct aa_count *count;
	struct cgroup *cgroup;
	__u32 level;
	char *ancestors;

	if (new_state != TCP_SYN_SENT)
		return 0;
	config = aa_observes();
	count = aa_counted(AA_CONNECT);
	if (!config || !count || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;

	cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	level = config->level;
	if (cgroup && BPF_CORE_READ(cgroup, level) >= (int)level) {
		struct cgroup *above = NULL;

		ancestors = (char *)cgroup + bpf_core_field_offset(struct cgroup, ancestors);
		bpf_probe_read_kernel(&above, sizeof(above), ancestors + level * sizeof(above));
		if (above && BPF_CORE_READ(above, kn, id) == config->slice)
			return 0;
	}
	key.cgroup = aa_current_run(config);
	key.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	key.port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	key.protocol = IPPROTO_TCP;
	key.type = SOCK_STREAM;
	key.via = AA_VIA_FOREIGN;
	if (key.family == AF_INET6)
		BPF_CORE_READ_INTO(&key.addr, sk, __sk_common.skc_v6_daddr.in6_u.u6_addr32);
	else
		key.addr[0] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	aa_tell_connect(config, &key, count);
	return 0;
}

static __always_inline void aa_asked(struct bpf_sock_addr *ctx, __u8 family, __u8 via,
				     struct aa_tally_key *key, const struct aa_config *config)
{
	key->cgroup = aa_current_run(config);
	key->family = family;
	key->type = ctx->type;
	key->protocol = ctx->protocol;
	key->port = bpf_ntohs(ctx->user_port);
	key->via = via;
	if (family == AF_INET) {
		key->addr[0] = ctx->user_ip4;
	} else {
		key->addr[0] = ctx->user_ip6[0];
		key->addr[1] = ctx->user_ip6[1];
		key->addr[2] = ctx->user_ip6[2];
		key->addr[3] = ctx->user_ip6[3];
	}
}

static __always_inline int aa_connect(struct bpf_sock_addr *ctx, __u8 family)
{
	const struct aa_config *config = aa_configuration();
	struct aa_count *count = aa_counted(AA_CONNECT);
	struct aa_tally_key key = {};

	if (config && count) {
		aa_asked(ctx, family, AA_VIA_CONNECT, &key, config);
		aa_tell_connect(config, &key, count);
	}
	return 1;
}

/* Datagrams without a connection: one call each, so they are tallied. */
static __always_inline int aa_datagram(struct bpf_sock_addr *ctx, __u8 family)
{
	const struct aa_config *config = aa_configuration();
	struct aa_count *count = aa_counted(AA_CONNECT);
	struct aa_tally_key key = {};
	struct aa_tally *tally = NULL;
	struct aa_net *record;
	__u64 total;

	if (!config || !count)
		return 1;
	aa_asked(ctx, family, AA_VIA_DATAGRAM, &key, config);
	total = aa_count_up(&key, count, &tally);
	if (!total || !tally)
		return 1;
	record = aa_reserve_net(key.cgroup);
	if (!record)
		return 1; /* the tally has it */
	aa_begin(&record->head, AA_CONNECT, sizeof(*record), key.cgroup);
	aa_who(&record->head, config);
	record->key = key;
	record->total = total;
	tally->told = record->head.time;
	bpf_ringbuf_submit(record, 0);
	return 1;
}

SEC("cgroup/connect4")
int aa_connect4(struct bpf_sock_addr *ctx)
{
	return aa_connect(ctx, AF_INET);
}

SEC("cgroup/connect6")
int aa_connect6(struct bpf_sock_addr *ctx)
{
	return aa_connect(ctx, AF_INET6);
}

SEC("cgroup/sendmsg4")
int aa_sendmsg4(struct bpf_sock_addr *ctx)
{
	return aa_datagram(ctx, AF_INET);
}

SEC("cgroup/sendmsg6")
int aa_sendmsg6(struct bpf_sock_addr *ctx)
{
	return aa_datagram(ctx, AF_INET6);
}

/* Run by the loader on itself: how deep its own cgroup is below the root of all
 * cgroups. Inside a container paths start elsewhere, so it cannot count slashes. */
SEC("syscall")
int aa_own_level(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, cgroups, dfl_cgrp, level);
}

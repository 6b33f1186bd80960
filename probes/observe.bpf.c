// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * What governed runs do: exec, exit, where they ask to connect to, and which files they
 * open for writing, make, remove and rename. Refuses nothing. Programs on tracepoints run
 * for every task of the machine, so the first thing each does is to return for what is
 * not below aa-agents.slice; the cgroup programs are attached to that slice and cost
 * others nothing.
 */
#include "shared.bpf.h"
#include "path.bpf.h"
#include "calls.bpf.h"

#define TCP_SYN_SENT 2
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define SOCK_STREAM 1
#define SIGNAL_GROUP_EXIT 0x4
#define FMODE_CREATED (1 << 20)
#define MODE_FORMAT 0170000
#define MODE_CHARACTER 0020000
#define DEVICE_NULL (1 << 20 | 3) /* /dev/null, as the kernel counts devices */
#define NEVER_RETURNED (-512)      /* from here on down a result is the kernel's own: the call goes on */
#define SECOND_NS 1000000000ULL

char LICENSE[] SEC("license") = "GPL";

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

/* Writes the name that was asked for to the beginning of the data. Returns its length with its NUL. */
__noinline __u32 aa_filename(__u64 address)
{
	struct aa_draft *draft = aa_draft_of(AA_DRAFT_EXEC);
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

/* Writes the arguments to the record from `start` on. Returns how many bytes that took. */
__noinline __u32 aa_arguments(__u64 address, __u64 len, __u32 start)
{
	struct aa_draft *draft = aa_draft_of(AA_DRAFT_EXEC);

	if (!draft || start > AA_DRAFT_BYTES - AA_ARGV_MAX)
		return 0;
	if (len > AA_ARGV_MAX) {
		len = AA_ARGV_MAX;
		draft->exec.head.flags |= AA_ARGV_CUT;
	}
	if (bpf_probe_read_user(&draft->bytes[start], len, (void *)address)) {
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
	struct aa_draft *draft = aa_draft_of(AA_DRAFT_EXEC);
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

	record->filename_len = aa_filename((__u64)BPF_CORE_READ(bprm, filename));
	len = offsetof(struct aa_exec, data) + record->filename_len;
	record->exe_len = aa_components((__u64)&file->f_path, len, AA_EXE_CUT, AA_DRAFT_EXEC);
	len += record->exe_len;
	record->cwd_len = 0;
	if (record->data[0] != '/') {
		fs = BPF_CORE_READ(task, fs);
		record->cwd_len = aa_components((__u64)&fs->pwd, len, AA_CWD_CUT, AA_DRAFT_EXEC);
		len += record->cwd_len;
	}
	start = BPF_CORE_READ(task, mm, arg_start);
	end = BPF_CORE_READ(task, mm, arg_end);
	record->argv_len = aa_arguments(start, end - start, len);
	len += record->argv_len;

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

/* Files. */

struct aa_rate {
	__u64 since;
	__u64 told;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_MAX_RUNS);
	__type(key, __u64);
	__type(value, struct aa_rate);
} aa_file_rates SEC(".maps");

/* True while the run is within its rate. */
static __always_inline int aa_file_may_tell(__u64 run)
{
	struct aa_rate *rate, fresh = {};
	__u64 now = bpf_ktime_get_boot_ns();

	rate = bpf_map_lookup_elem(&aa_file_rates, &run);
	if (!rate) {
		bpf_map_update_elem(&aa_file_rates, &run, &fresh, BPF_NOEXIST);
		rate = bpf_map_lookup_elem(&aa_file_rates, &run);
		if (!rate)
			return 0;
	}
	if (now - rate->since > SECOND_NS) {
		rate->since = now;
		rate->told = 0;
	}
	return __sync_fetch_and_add(&rate->told, 1) < AA_FILE_RATE;
}

/* Writes a name from the program's memory to a file record from `start` on. Returns its length with its NUL. */
__noinline __u32 aa_file_text(__u64 address, __u32 start, __u32 cut)
{
	struct aa_draft *draft = aa_draft_of(AA_DRAFT_FILE);
	long read;

	if (!draft || start > AA_DRAFT_BYTES - AA_PATH_MAX)
		return 0;
	read = bpf_probe_read_user_str(&draft->bytes[start], AA_PATH_MAX, (void *)address);
	if (read < 1) {
		draft->head.flags |= cut;
		return 0;
	}
	if (read == AA_PATH_MAX)
		draft->head.flags |= cut;
	return read;
}

/* Writes the directory that a relative name begins in: that of a descriptor, or the working directory. */
__noinline __u32 aa_file_directory(int fd, __u32 start, __u32 cut)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct aa_draft *draft = aa_draft_of(AA_DRAFT_FILE);
	struct fs_struct *fs;
	struct file *file;

	if (fd == AT_FDCWD) {
		fs = BPF_CORE_READ(task, fs);
		return aa_components((__u64)&fs->pwd, start, cut, AA_DRAFT_FILE);
	}
	file = aa_open_file(fd);
	if (file)
		return aa_components((__u64)&file->f_path, start, cut, AA_DRAFT_FILE);
	if (draft)
		draft->head.flags |= cut;
	return 0;
}

/* Whether a name that was written to `at` is there and does not begin at the root. */
static __always_inline int aa_relative(struct aa_draft *draft, __u32 at, __u32 len)
{
	return len && at < AA_DRAFT_BYTES && draft->bytes[at] != '/';
}

/* What an open() returned: the file itself, as the kernel holds it. Returns the length of its path. */
static __always_inline __u32 aa_opened(struct aa_file *record, struct file *file, __u32 start)
{
	__u32 len;

	record->inode = BPF_CORE_READ(file, f_inode, i_ino);
	record->device = BPF_CORE_READ(file, f_inode, i_sb, s_dev);
	if (BPF_CORE_READ(file, f_mode) & FMODE_CREATED)
		record->head.flags |= AA_CREATED;
	len = aa_components((__u64)&file->f_path, start, AA_DIR_CUT, AA_DRAFT_FILE);
	if (len) /* a pipe or a socket, opened once more, lies in no directory */
		record->head.flags |= AA_OPENED;
	return len;
}

static __always_inline int aa_is_null_device(struct file *file)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);

	return (BPF_CORE_READ(inode, i_mode) & MODE_FORMAT) == MODE_CHARACTER &&
	       BPF_CORE_READ(inode, i_rdev) == DEVICE_NULL;
}

/* Files that were told as mapped, and when. */
struct aa_mapped_key {
	__u64 inode;
	__u32 device;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_MAX_MAPPED);
	__type(key, struct aa_mapped_key);
	__type(value, __u64);
} aa_mapped_files SEC(".maps");

/* A program has mapped code: a library, perhaps one that needs probes. */
static __always_inline void aa_tell_mapped(const struct aa_config *config, struct file *file)
{
	struct aa_count *count = aa_counted(AA_MAPPED);
	__u64 now = bpf_ktime_get_boot_ns(), *told;
	struct aa_mapped_key key = {};
	struct aa_mapped *record;

	if (!file || !count)
		return;
	key.inode = BPF_CORE_READ(file, f_inode, i_ino);
	key.device = BPF_CORE_READ(file, f_inode, i_sb, s_dev);
	told = bpf_map_lookup_elem(&aa_mapped_files, &key);
	if (told && now - *told < AA_MAPPED_QUIET_NS)
		return;
	if (bpf_ringbuf_query(&aa_events, BPF_RB_AVAIL_DATA) > AA_RING_FOR_FILES)
		goto lost;
	record = bpf_ringbuf_reserve(&aa_events, sizeof(*record), 0);
	if (!record)
		goto lost;
	bpf_map_update_elem(&aa_mapped_files, &key, &now, BPF_ANY);
	aa_begin(&record->head, AA_MAPPED, sizeof(*record), aa_current_run(config));
	aa_who(&record->head, config);
	record->inode = key.inode;
	record->device = key.device;
	record->pad = 0;
	aa_add(&count->events);
	bpf_ringbuf_submit(record, 0);
	return;
lost:
	aa_add(&count->lost);
}

/*
 * A system call has returned. Nothing else tells of files on every kernel that we run on,
 * and here the result is known, the opened file among it. A name that was no open() may
 * have been changed by another thread since the kernel read it: it is evidence.
 */
SEC("tp_btf/sys_exit")
int BPF_PROG(aa_on_file, struct pt_regs *regs, long result)
{
	const struct aa_config *config;
	struct aa_tally *tally = NULL;
	struct aa_tally_key key = {};
	struct aa_named named = {};
	struct file *file = NULL;
	struct aa_count *count;
	struct aa_draft *draft;
	struct aa_file *record;
	__u64 how;
	__u32 len;

	aa_call_of((void *)regs, &named);
	if (!named.call && !named.maps)
		return 0;
	config = aa_observes();
	if (!config || aa_compat())
		return 0;
	if (named.maps) {
		if (result > 0) /* an address */
			aa_tell_mapped(config, aa_open_file(named.dir));
		return 0;
	}
	if (result <= NEVER_RETURNED)
		return 0;
	if (named.call == AA_CALL_OPENAT2) {
		const struct pt_regs___call *call = (void *)regs;

		/* struct open_how begins with the flags. */
		if (bpf_probe_read_user(&how, sizeof(how), (void *)AA_CALL_ARG2(call)))
			return 0;
		named.flags = how;
	}
	if (named.opens) {
		if (named.flags & O_PATH)
			return 0;
		if (!(named.flags & (O_ACCMODE | O_CREAT | O_TRUNC)))
			return 0;
		if (result >= 0)
			file = aa_open_file(result);
		if (file && aa_is_null_device(file))
			return 0;
		if (!file && !named.text)
			return 0; /* a handle that opened nothing has no name */
	}

	count = aa_counted(AA_FILE);
	draft = aa_draft_of(AA_DRAFT_FILE);
	if (!count || !draft)
		return 0;
	key.cgroup = aa_current_run(config);
	if (!aa_file_may_tell(key.cgroup)) {
		key.via = AA_VIA_FILES;
		aa_count_up(&key, count, &tally);
		return 0;
	}
	record = &draft->file;
	aa_begin(&record->head, AA_FILE, 0, key.cgroup);
	aa_who(&record->head, config);
	record->inode = 0;
	record->device = 0;
	record->call = named.call;
	record->call_flags = named.flags;
	record->result = result < 0 ? result : 0;
	record->text_len = record->dir_len = record->to_len = record->to_dir_len = 0;

	len = offsetof(struct aa_file, data);
	if (file)
		record->dir_len = aa_opened(record, file, len);
	if (!record->dir_len) {
		record->text_len = aa_file_text(named.text, len, AA_TEXT_CUT);
		len += record->text_len;
		/* What a symbolic link says is no path of ours. */
		if (named.call != AA_CALL_SYMLINK && named.call != AA_CALL_SYMLINKAT &&
		    aa_relative(draft, offsetof(struct aa_file, data), record->text_len))
			record->dir_len = aa_file_directory(named.dir, len, AA_DIR_CUT);
	}
	len += record->dir_len;
	if (named.to) {
		__u32 at = len;

		record->to_len = aa_file_text(named.to, len, AA_TO_CUT);
		len += record->to_len;
		if (aa_relative(draft, at, record->to_len))
			record->to_dir_len = aa_file_directory(named.to_dir, len, AA_TO_DIR_CUT);
		len += record->to_dir_len;
	}
	if (len > sizeof(*record))
		len = sizeof(*record); /* cannot be: each part above has its bound */
	record->head.size = len;
	if ((bpf_ringbuf_query(&aa_events, BPF_RB_AVAIL_DATA) > AA_RING_FOR_FILES &&
	     record->head.cgroup != config->canary) ||
	    bpf_ringbuf_output(&aa_events, record, len, 0))
		aa_add(&count->lost);
	else
		aa_add(&count->events);
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

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Maps that all objects share (the loader pins the first one's and hands them to
 * the others), who a run is, and how a record gets into the ring.
 */
#ifndef AA_SHARED_BPF_H
#define AA_SHARED_BPF_H

#include "kernel.h"
#include "events.h"

#define AF_INET 2
#define AF_INET6 10

/* The loader counts this up each time it loads, see aa_config.generation. */
const volatile __u32 aa_generation = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct aa_config);
} aa_config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, AA_RING_BYTES);
} aa_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, AA_KINDS);
	__type(key, __u32);
	__type(value, struct aa_count);
} aa_counts SEC(".maps");

/* Least recently used keys give way: a flood of new keys cannot use up memory,
 * and aa_count.tallied still knows how many there were. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, AA_MAX_TALLIES);
	__type(key, struct aa_tally_key);
	__type(value, struct aa_tally);
} aa_tallies SEC(".maps");

/* The last quarter of the ring is kept for exec and exit, so that a flood of packets
 * cannot hide what is started, and for the canary, so that one run's flood cannot keep
 * the others from being started. */
#define AA_RING_FOR_NET (AA_RING_BYTES - AA_RING_BYTES / 4)
/* And a flood of files leaves as much for connections. */
#define AA_RING_FOR_FILES (AA_RING_BYTES / 2)

/* Levels of nested pid namespaces that are searched for the loader's own. */
#define AA_PIDNS_DEPTH 8

static __always_inline const struct aa_config *aa_configuration(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&aa_config, &zero);
}

static __always_inline struct aa_count *aa_counted(__u32 kind)
{
	return bpf_map_lookup_elem(&aa_counts, &kind);
}

static __always_inline void aa_add(__u64 *counter)
{
	/* Atomic: a program may be preempted by another one on the same CPU. */
	__sync_fetch_and_add(counter, 1);
}

static __always_inline int aa_governed(const struct aa_config *config)
{
	return config->slice &&
	       bpf_get_current_ancestor_cgroup_id(config->level) == config->slice;
}

/* The run of the current task: runs are two levels below the slice; something
 * that lives higher is known by the cgroup it is in. 0 for what is not governed. */
static __always_inline __u64 aa_current_run(const struct aa_config *config)
{
	__u64 id;

	if (!aa_governed(config))
		return 0;
	id = bpf_get_current_ancestor_cgroup_id(config->level + 2);
	return id ? id : bpf_get_current_cgroup_id();
}

struct aa_pid_search {
	__u64 number; /* address of a struct upid */
	__u32 depth;
	__u32 pidns;
	__u32 found;
	__u32 pad;
};

static long aa_pid_at(__u32 level, struct aa_pid_search *search)
{
	struct upid *upid = (void *)search->number;

	if (level > search->depth)
		return 1;
	if (BPF_CORE_READ(upid, ns, ns.inum) == search->pidns) {
		search->found = BPF_CORE_READ(upid, nr);
		return 1;
	}
	search->number += bpf_core_type_size(struct upid);
	return 0;
}

/*
 * The pid of a task's process in the loader's pid namespace, 0 if it has none there.
 *
 * A global function: verified once by itself, not once more for each way to a call. And
 * bpf_loop: of a plain loop newer compilers make one whose end older verifiers do not see.
 */
__noinline __u32 aa_pid_of(__u64 address, __u32 pidns)
{
	struct task_struct *task = (void *)address;
	struct pid *pid = BPF_CORE_READ(task, group_leader, thread_pid);
	struct aa_pid_search search = {
		.number = (__u64)pid + bpf_core_field_offset(struct pid, numbers),
		.depth = BPF_CORE_READ(pid, level),
		.pidns = pidns,
	};

	bpf_loop(AA_PIDNS_DEPTH, aa_pid_at, &search, 0);
	return search.found;
}

static __always_inline void aa_begin(struct aa_head *head, __u8 kind, __u16 size, __u64 cgroup)
{
	head->size = size;
	head->layout = AA_LAYOUT;
	head->kind = kind;
	head->flags = cgroup ? 0 : AA_OUTSIDE;
	head->time = bpf_ktime_get_boot_ns();
	head->cgroup = cgroup;
	head->pad = 0;
}

/* Who the current task is. Not for packets: those may be sent by anyone's interrupt. */
static __always_inline void aa_who(struct aa_head *head, const struct aa_config *config)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	head->pid = aa_pid_of((__u64)task, config->pidns);
	head->ppid = aa_pid_of((__u64)BPF_CORE_READ(task, real_parent), config->pidns);
	head->uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(head->comm, sizeof(head->comm));
}

static __always_inline void aa_nobody(struct aa_head *head)
{
	head->pid = 0;
	head->ppid = 0;
	head->uid = 0;
	__builtin_memset(head->comm, 0, sizeof(head->comm));
}

/* Room for a network record of a run, or NULL. */
static __always_inline struct aa_net *aa_reserve_net(__u64 run)
{
	const struct aa_config *config = aa_configuration();

	if (bpf_ringbuf_query(&aa_events, BPF_RB_AVAIL_DATA) > AA_RING_FOR_NET &&
	    (!run || !config || run != config->canary))
		return NULL;
	return bpf_ringbuf_reserve(&aa_events, sizeof(struct aa_net), 0);
}

/*
 * Counts what may happen a million times a second. The first of a key, and then at
 * most one a second, is to be told: returns its total so far, else 0. The loader
 * reads the table for the rest.
 */
static __always_inline __u64 aa_count_up(const struct aa_tally_key *key, struct aa_count *count,
					 struct aa_tally **found)
{
	struct aa_tally fresh = {};
	struct aa_tally *tally;
	__u64 now;

	aa_add(&count->tallied);
	tally = bpf_map_lookup_elem(&aa_tallies, key);
	if (!tally) {
		bpf_map_update_elem(&aa_tallies, key, &fresh, BPF_NOEXIST);
		tally = bpf_map_lookup_elem(&aa_tallies, key);
		if (!tally)
			return 0;
	}
	aa_add(&tally->total);
	now = bpf_ktime_get_boot_ns();
	if (tally->told && now - tally->told < AA_TALLY_QUIET_NS)
		return 0;
	*found = tally;
	return tally->total;
}

#endif

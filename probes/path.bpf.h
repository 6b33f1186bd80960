/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Records with paths in them: the draft that one is put together in, and the walk from
 * a file up to the root of its mount namespace.
 */
#ifndef AA_PATH_BPF_H
#define AA_PATH_BPF_H

#include "shared.bpf.h"
#include "open.bpf.h"

/*
 * A walk lies in a map and not on the stack, where the verifier would follow its numbers
 * from step to step and, on older kernels, never see an end.
 */
struct aa_walk {
	__u64 dentry;
	__u64 mount;
	__u32 start; /* where in the record */
	__u32 len;
	__u32 complete;
	__u32 pad;
};

/*
 * A record is put together here and then copied, so that a short one takes little of
 * the ring. Each program has a draft of its own: one may come while another is at work.
 */
enum aa_drafting {
	AA_DRAFT_EXEC = 0,
	AA_DRAFT_FILE = 1,
	AA_DRAFTS = 2,
};

#define AA_DRAFT_BYTES sizeof(struct aa_file) /* the largest record */

struct aa_draft {
	struct aa_walk walk;
	union {
		struct aa_head head;
		struct aa_exec exec;
		struct aa_file file;
		char bytes[AA_DRAFT_BYTES];
	};
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, AA_DRAFTS);
	__type(key, __u32);
	__type(value, struct aa_draft);
} aa_drafts SEC(".maps");

static __always_inline struct aa_draft *aa_draft_of(__u32 which)
{
	return bpf_map_lookup_elem(&aa_drafts, &which);
}

/* One step: writes one name, or goes from a mount to what it is mounted on. */
static long aa_step_up(__u32 step, __u32 *which)
{
	struct aa_draft *draft = aa_draft_of(*which);
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
	if (walk->len > AA_PATH_MAX - AA_NAME_MAX || at > AA_DRAFT_BYTES - AA_NAME_MAX)
		return 1;
	written = bpf_probe_read_kernel_str(&draft->bytes[at], AA_NAME_MAX,
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
 * The parts of a record. Each is a global function, which the verifier judges by itself:
 * as one program their bounds multiply, and older kernels give up.
 *
 * This one writes the components of a path into a draft from `start` on, from the leaf
 * to the root of the mount namespace; a chroot does not shorten it. Returns their length
 * and sets `cut` in the draft's flags when the bounds were met first.
 */
__noinline __u32 aa_components(__u64 address, __u32 start, __u32 cut, __u32 which)
{
	const struct path *path = (void *)address;
	struct aa_draft *draft = aa_draft_of(which);

	if (!draft)
		return 0;
	draft->walk.dentry = (__u64)BPF_CORE_READ(path, dentry);
	draft->walk.mount =
		(__u64)BPF_CORE_READ(path, mnt) - bpf_core_field_offset(struct mount, mnt);
	draft->walk.start = start;
	draft->walk.len = 0;
	draft->walk.complete = 0;
	bpf_loop(AA_PATH_DEPTH, aa_step_up, &which, 0);
	if (!draft->walk.complete)
		draft->head.flags |= cut;
	return draft->walk.len;
}

#endif

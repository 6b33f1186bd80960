/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* From a descriptor of the current task to what it stands for. */
#ifndef AA_OPEN_BPF_H
#define AA_OPEN_BPF_H

#include "kernel.h"

/* The open file behind a descriptor of the current task, or NULL. */
static __always_inline struct file *aa_open_file(int fd)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct file **slots, *file = NULL;
	struct fdtable *table;

	table = BPF_CORE_READ(task, files, fdt);
	if (fd < 0 || (__u32)fd >= BPF_CORE_READ(table, max_fds))
		return NULL;
	slots = BPF_CORE_READ(table, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), slots + fd))
		return NULL;
	return file;
}

#endif

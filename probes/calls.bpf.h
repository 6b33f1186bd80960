/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What a system call that has returned says about files: which name, below which
 * directory, and how. Not every architecture has the older ones.
 */
#ifndef AA_CALLS_BPF_H
#define AA_CALLS_BPF_H

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include "kernel.h"
#include "events.h"

struct aa_named {
	__u64 text; /* addresses in the program's memory; 0: there is no such name */
	__u64 to;
	__s32 dir; /* descriptors, or AT_FDCWD */
	__s32 to_dir;
	__u32 flags;
	__u32 call;  /* enum aa_call; 0: a call that names no file to us */
	__u32 opens; /* returns a descriptor */
	__u32 maps;  /* maps the file behind `dir` to execute */
};

#if defined(__TARGET_ARCH_x86)
#define AA_CALL_NUMBER(regs) ((regs)->orig_ax)
#define AA_CALL_ARG0(regs) ((regs)->di)
#define AA_CALL_ARG1(regs) ((regs)->si)
#define AA_CALL_ARG2(regs) ((regs)->dx)
#define AA_CALL_ARG3(regs) ((regs)->r10)
#define AA_CALL_ARG4(regs) ((regs)->r8)
#elif defined(__TARGET_ARCH_arm64)
#define AA_CALL_NUMBER(regs) ((unsigned long)(regs)->syscallno)
#define AA_CALL_ARG0(regs) ((regs)->orig_x0)
#define AA_CALL_ARG1(regs) ((regs)->regs[1])
#define AA_CALL_ARG2(regs) ((regs)->regs[2])
#define AA_CALL_ARG3(regs) ((regs)->regs[3])
#define AA_CALL_ARG4(regs) ((regs)->regs[4])
#else
#error "where are the arguments of a system call here?"
#endif

#define TS_COMPAT 0x0002

/* True in a system call of a 32-bit program: its numbers mean something else. Runs cannot make any. */
static __always_inline int aa_compat(void)
{
#if defined(__TARGET_ARCH_x86)
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, thread_info.status) & TS_COMPAT;
#else
	return 0;
#endif
}

#define AA_NAMED(call_, opens_, dir_, text_, flags_)                                        \
	do {                                                                                \
		named->call = (call_);                                                      \
		named->opens = (opens_);                                                    \
		named->dir = (dir_);                                                        \
		named->text = (text_);                                                      \
		named->flags = (flags_);                                                    \
	} while (0)
#define AA_AND_TO(dir_, text_)                                                              \
	do {                                                                                \
		named->to_dir = (dir_);                                                     \
		named->to = (text_);                                                        \
	} while (0)

/* Fills `named` from the registers. Every system call of the machine comes here, so nothing else happens. */
static __always_inline void aa_call_of(const struct pt_regs___call *regs, struct aa_named *named)
{
	switch (AA_CALL_NUMBER(regs)) {
	case __NR_mmap:
		named->maps = (AA_CALL_ARG2(regs) & PROT_EXEC) &&
			      !(AA_CALL_ARG3(regs) & MAP_ANONYMOUS);
		named->dir = AA_CALL_ARG4(regs);
		break;
#ifdef __NR_open
	case __NR_open:
		AA_NAMED(AA_CALL_OPEN, 1, AT_FDCWD, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs));
		break;
	case __NR_creat:
		AA_NAMED(AA_CALL_CREAT, 1, AT_FDCWD, AA_CALL_ARG0(regs),
			 O_WRONLY | O_CREAT | O_TRUNC);
		break;
	case __NR_mkdir:
		AA_NAMED(AA_CALL_MKDIR, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		break;
	case __NR_mknod:
		AA_NAMED(AA_CALL_MKNOD, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		break;
	case __NR_link:
		AA_NAMED(AA_CALL_LINK, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		AA_AND_TO(AT_FDCWD, AA_CALL_ARG1(regs));
		break;
	case __NR_symlink:
		AA_NAMED(AA_CALL_SYMLINK, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		AA_AND_TO(AT_FDCWD, AA_CALL_ARG1(regs));
		break;
	case __NR_unlink:
		AA_NAMED(AA_CALL_UNLINK, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		break;
	case __NR_rmdir:
		AA_NAMED(AA_CALL_RMDIR, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		break;
	case __NR_rename:
		AA_NAMED(AA_CALL_RENAME, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		AA_AND_TO(AT_FDCWD, AA_CALL_ARG1(regs));
		break;
#endif
#ifdef __NR_renameat
	case __NR_renameat:
		AA_NAMED(AA_CALL_RENAMEAT, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs), 0);
		AA_AND_TO(AA_CALL_ARG2(regs), AA_CALL_ARG3(regs));
		break;
#endif
	case __NR_openat:
		AA_NAMED(AA_CALL_OPENAT, 1, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs),
			 AA_CALL_ARG2(regs));
		break;
	case __NR_openat2: /* its flags lie in the program's memory: read by whoever needs them */
		AA_NAMED(AA_CALL_OPENAT2, 1, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs), 0);
		break;
	case __NR_open_by_handle_at:
		AA_NAMED(AA_CALL_OPEN_BY_HANDLE_AT, 1, AT_FDCWD, 0, AA_CALL_ARG2(regs));
		break;
	case __NR_truncate:
		AA_NAMED(AA_CALL_TRUNCATE, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		break;
	case __NR_mkdirat:
		AA_NAMED(AA_CALL_MKDIRAT, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs), 0);
		break;
	case __NR_mknodat:
		AA_NAMED(AA_CALL_MKNODAT, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs), 0);
		break;
	case __NR_linkat:
		AA_NAMED(AA_CALL_LINKAT, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs),
			 AA_CALL_ARG4(regs));
		AA_AND_TO(AA_CALL_ARG2(regs), AA_CALL_ARG3(regs));
		break;
	case __NR_symlinkat:
		AA_NAMED(AA_CALL_SYMLINKAT, 0, AT_FDCWD, AA_CALL_ARG0(regs), 0);
		AA_AND_TO(AA_CALL_ARG1(regs), AA_CALL_ARG2(regs));
		break;
	case __NR_unlinkat:
		AA_NAMED(AA_CALL_UNLINKAT, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs),
			 AA_CALL_ARG2(regs));
		break;
	case __NR_renameat2:
		AA_NAMED(AA_CALL_RENAMEAT2, 0, AA_CALL_ARG0(regs), AA_CALL_ARG1(regs),
			 AA_CALL_ARG4(regs));
		AA_AND_TO(AA_CALL_ARG2(regs), AA_CALL_ARG3(regs));
		break;
	}
}

#endif

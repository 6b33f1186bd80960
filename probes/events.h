/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the kernel side tells and what it is told: records of the ring, and the
 * keys and values of the maps. Shared by every object here; aa/ebpf/events.py and
 * aa/ebpf/tables.py hold the same layout, and a test compares the two.
 *
 * Every structure has its padding written out. Numbers are in host byte order,
 * addresses in network byte order (an IPv4 address is addr[0], the rest is 0).
 */
#ifndef AA_EVENTS_H
#define AA_EVENTS_H

/* Grows with each change below. Pinned maps of another layout are not taken over. */
#define AA_LAYOUT 2

#define AA_RING_BYTES (1 << 20)
#define AA_MAX_ENDS 64
#define AA_MAX_TALLIES 8192

#define AA_COMM_MAX 16
#define AA_ARGV_MAX 1024     /* bytes of argv in one record */
#define AA_FILENAME_MAX 512  /* with its NUL */
#define AA_PATH_MAX 1024     /* bytes of path components, each with its NUL */
#define AA_PATH_DEPTH 40     /* steps up: components and mounts */
#define AA_NAME_MAX 256      /* one component with its NUL */
#define AA_EXEC_DATA_MAX (AA_FILENAME_MAX + 2 * AA_PATH_MAX + AA_ARGV_MAX)
#define AA_FILE_DATA_MAX (4 * AA_PATH_MAX) /* two names, and for each a directory */

/* Records of files of one run in one second; the rest is tallied, see AA_VIA_FILES. */
#define AA_FILE_RATE 2000
#define AA_MAX_RUNS 512

/* A file that was mapped to execute is told of at most once in this time. */
#define AA_MAPPED_QUIET_NS 60000000000ULL
#define AA_MAX_MAPPED 8192

/* A tally tells of itself at most once in this time. */
#define AA_TALLY_QUIET_NS 1000000000ULL

enum aa_kind {
	AA_EXEC = 1,
	AA_EXIT = 2,
	AA_CONNECT = 3,
	AA_REFUSED = 4,
	AA_FILE = 5,
	AA_MAPPED = 6, /* for the search for TLS libraries; no record of the audit */
	AA_KINDS = 8, /* size of the table of counts */
};

enum aa_via {
	AA_VIA_CONNECT = 0,  /* connect(), TCP fast open among it */
	AA_VIA_DATAGRAM = 1, /* sendto() on a socket that is not connected */
	AA_VIA_FOREIGN = 2,  /* connect() on a socket that was made outside every run */
	AA_VIA_FILES = 3,    /* no connection: file calls of a run beyond its rate */
};

/* System calls that open for writing, make, remove or rename a file. */
enum aa_call {
	AA_CALL_OPEN = 1,
	AA_CALL_OPENAT = 2,
	AA_CALL_OPENAT2 = 3,
	AA_CALL_CREAT = 4,
	AA_CALL_OPEN_BY_HANDLE_AT = 5,
	AA_CALL_TRUNCATE = 6,
	AA_CALL_MKDIR = 7,
	AA_CALL_MKDIRAT = 8,
	AA_CALL_MKNOD = 9,
	AA_CALL_MKNODAT = 10,
	AA_CALL_LINK = 11,
	AA_CALL_LINKAT = 12,
	AA_CALL_SYMLINK = 13,
	AA_CALL_SYMLINKAT = 14,
	AA_CALL_UNLINK = 15,
	AA_CALL_UNLINKAT = 16,
	AA_CALL_RMDIR = 17,
	AA_CALL_RENAME = 18,
	AA_CALL_RENAMEAT = 19,
	AA_CALL_RENAMEAT2 = 20,
};

enum aa_reason {
	AA_NOT_REFUSED = 0,
	AA_REFUSED_END = 1,       /* a packet to an end that is not listed */
	AA_REFUSED_FRAGMENT = 2,  /* a fragment, or one with IP options */
	AA_REFUSED_HEADER = 3,    /* neither TCP nor UDP behind the IP header, or no IP at all */
	AA_REFUSED_INTERFACE = 4, /* a listed end, but not through loopback */
	AA_REFUSED_SOCKET = 5,    /* a socket of a type or protocol that runs do not get */
	AA_REFUSED_JOIN = 6,      /* a multicast group, whose reports would leave on their own */
};

enum aa_flags {
	AA_ARGV_CUT = 1 << 0,
	AA_ARGV_UNREAD = 1 << 1, /* the program's memory could not be read */
	AA_FILENAME_CUT = 1 << 2,
	AA_EXE_CUT = 1 << 3,
	AA_CWD_CUT = 1 << 4,
	AA_OUTSIDE = 1 << 5, /* the process is in no run, the socket is */
	/* Of a file: */
	AA_OPENED = 1 << 6,   /* dir is the path of the file itself, as the kernel holds it */
	AA_CREATED = 1 << 7,  /* the call made the file that it opened */
	AA_TEXT_CUT = 1 << 8, /* of a name: longer than its room, or its memory could not be read */
	AA_DIR_CUT = 1 << 9,  /* of a directory: longer than its room, or not found */
	AA_TO_CUT = 1 << 10,
	AA_TO_DIR_CUT = 1 << 11,
};

struct aa_head {
	__u16 size; /* of the whole record */
	__u8 layout;
	__u8 kind;
	__u32 flags;
	__u64 time;   /* CLOCK_BOOTTIME, ns */
	__u64 cgroup; /* of the run; 0 when the process is in none */
	__u32 pid;    /* as the loader's pid namespace sees them; 0 when it does not */
	__u32 ppid;
	__u32 uid;
	__u32 pad;
	char comm[AA_COMM_MAX];
};

/* data: filename, executable's path, working directory, argv, in this order without gaps. */
struct aa_exec {
	struct aa_head head;
	__u64 inode; /* of the executable */
	__u32 device;
	__u32 argc;
	__u16 filename_len; /* with its NUL */
	__u16 exe_len;      /* components from the leaf up, each with its NUL */
	__u16 cwd_len;      /* the same; 0 when the filename is absolute */
	__u16 argv_len;     /* arguments, each with its NUL but the last when it is cut */
	char data[AA_EXEC_DATA_MAX];
};

struct aa_exit {
	struct aa_head head;
	__u64 age_ns;
	__u32 status; /* as wait() tells it */
	__u32 pad;
};

/*
 * data: name, directory, second name, its directory, without gaps. A name is what the
 * program's memory held when the call returned, with its NUL; a directory is components
 * from the leaf up, and is there when the name does not begin at the root.
 */
struct aa_file {
	struct aa_head head;
	__u64 inode; /* of an opened file */
	__u32 device;
	__u32 call_flags; /* O_*, AT_* or RENAME_*, as the call takes them */
	__s32 result;     /* 0 or the negative errno */
	__u16 text_len;
	__u16 dir_len;
	__u16 to_len;
	__u16 to_dir_len;
	__u8 call; /* enum aa_call */
	__u8 pad[3];
	char data[AA_FILE_DATA_MAX];
};

struct aa_mapped {
	struct aa_head head;
	__u64 inode;
	__u32 device;
	__u32 pad;
};

/* What is counted together. Also the key of a refusal. */
struct aa_tally_key {
	__u64 cgroup;
	__u32 addr[4];
	__u16 port;
	__u16 protocol; /* IPPROTO_*; MPTCP needs more than eight bits */
	__u8 family;
	__u8 type;   /* SOCK_*, for AA_REFUSED_SOCKET */
	__u8 reason; /* enum aa_reason */
	__u8 via;    /* enum aa_via */
};

struct aa_tally {
	__u64 total;  /* since the key exists; only grows */
	__u64 told;   /* when it was last put into the ring */
};

/* AA_CONNECT and AA_REFUSED. For those that are tallied `total` is what the tally holds. */
struct aa_net {
	struct aa_head head;
	struct aa_tally_key key;
	__u64 total; /* 0: not tallied, this is one event */
};

/* An end that packets of the proxy slice may go to. */
struct aa_end {
	__u32 addr[4];
	__u16 port;
	__u8 protocol;
	__u8 family;
};

struct aa_config {
	__u64 slice;       /* cgroup id of aa-agents.slice; 0: nothing is observed */
	__u32 level;       /* its depth below the root of all cgroups */
	__u32 pidns;       /* inode of the loader's pid namespace */
	__u32 generation;  /* tracing programs of another generation keep silent */
	__u32 pad;
	__u64 canary;      /* cgroup id of the canary that flies now; 0: none */
};

/* Per CPU and per kind. All only grow. */
struct aa_count {
	__u64 events;  /* put into the ring, without those that are tallied */
	__u64 lost;    /* did not fit into it */
	__u64 tallied; /* happened, for kinds that are tallied; the rest is in the tallies or gone */
	__u64 pad;
};

#endif

/* Counts the calls that change files below a folder, and at the k-th one kills the process, tears the write, or fails.
   cc -shared -fPIC -O1 -o shim.so shim.c -ldl; LD_PRELOAD=shim.so; armed by faults_arm() in the process itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, TEAR, FAIL, FAIL_ON };     /* FAIL: this call; FAIL_ON: this and all later ones */

static char prefix[4096];
static int mode = OFF, error = 0, trace = -1;
static long at = 0;
static atomic_long calls = 0;

void faults_arm(const char *folder, int how, long k, int number, int trace_fd) {
    snprintf(prefix, sizeof prefix, "%s/", folder);
    at = k;
    error = number;
    trace = trace_fd;
    calls = 0;
    mode = how;
}

static int below(const char *path) { return strncmp(path, prefix, strlen(prefix)) == 0; }

static const char *of_fd(int fd, char *room, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, link, room, size - 1);
    room[n < 0 ? 0 : n] = 0;
    return room;
}

static const char *in_folder(int folder, const char *path, char *room, size_t size) {
    if (path[0] == '/' || folder == AT_FDCWD) return path;
    of_fd(folder, room, size);
    size_t n = strlen(room);
    snprintf(room + n, size - n, "/%s", path);
    return room;
}

/* 0: go on. 1: fail with `error`. 2: tear the write, then die. */
static int meets(const char *call, const char *path, int can_tear) {
    if (mode == OFF || !below(path)) return 0;
    long number = ++calls;
    int now = mode != COUNT && (number == at || (mode == FAIL_ON && number > at));
    if (trace >= 0 && (mode == COUNT || number == at)) {
        char line[4400];
        int n = snprintf(line, sizeof line, "%s %s\n", call, path + strlen(prefix));
        syscall(SYS_write, trace, line, n);
    }
    if (!now) return 0;
    if (mode == TEAR && can_tear) return 2;
    if (mode == KILL || mode == TEAR) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }
    errno = error;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FD(name, fd) char room[4096]; if (mode != OFF && meets(#name, of_fd(fd, room, sizeof room), 0)) return -1
#define PATH(name, folder, path) char room[4096]; \
    if (mode != OFF && meets(#name, in_folder(folder, path, room, sizeof room), 0)) return -1

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    char room[4096];
    int what = mode == OFF ? 0 : meets("write", of_fd(fd, room, sizeof room), n > 1);
    if (what == 2) { real(fd, data, n / 2); die(); }
    return what ? -1 : real(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); FD(writev, fd); return real(fd, v, n); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { REAL(pwrite64); FD(pwrite64, fd); return real(fd, d, n, o); }
int fsync(int fd) { REAL(fsync); FD(fsync, fd); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); FD(fdatasync, fd); return real(fd); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); FD(ftruncate64, fd); return real(fd, n); }
int rename(const char *a, const char *b) { REAL(rename); PATH(rename, AT_FDCWD, b); return real(a, b); }
int unlink(const char *p) { REAL(unlink); PATH(unlink, AT_FDCWD, p); return real(p); }
int rmdir(const char *p) { REAL(rmdir); PATH(rmdir, AT_FDCWD, p); return real(p); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); PATH(mkdir, AT_FDCWD, p); return real(p, m); }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); PATH(unlinkat, d, p); return real(d, p, f); }
int mkdirat(int d, const char *p, mode_t m) { REAL(mkdirat); PATH(mkdirat, d, p); return real(d, p, m); }
int renameat(int c, const char *a, int d, const char *b) { REAL(renameat); PATH(renameat, d, b); return real(c, a, d, b); }

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND))
#define MODE mode_t m = 0; if (flags & O_CREAT) { va_list v; va_start(v, flags); m = va_arg(v, mode_t); va_end(v); }
#define OPEN(name) int name(const char *p, int flags, ...) { MODE REAL(name); \
    if (WRITES(flags)) { PATH(name, AT_FDCWD, p); } return real(p, flags, m); }
#define OPENAT(name) int name(int d, const char *p, int flags, ...) { MODE REAL(name); \
    if (WRITES(flags)) { PATH(name, d, p); } return real(d, p, flags, m); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

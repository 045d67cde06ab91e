/* Preloaded before libc: lets the n-th call that changes a file under one folder fail, or kill the process there.

   Counted are open with O_CREAT, write, pwrite, fsync, fdatasync, ftruncate, rename, mkdir and symlink. A write that is
   to fail, or to be the last, first writes half of its bytes, as a disk does that fills up in the middle. Reads can be
   cut to a few bytes each, as network file systems and signals do, or fail from the n-th on. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long calls, fail_at, kill_at, injected, reads, fail_read_at;
static int persistent, error_code, read_error;
static size_t longest_read;

#define EXPORT __attribute__((visibility("default")))
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

EXPORT void disk_reset(const char *under) {
    snprintf(folder, sizeof folder, "%s", under);
    calls = fail_at = kill_at = injected = reads = fail_read_at = 0;
    longest_read = 0;
}
EXPORT void disk_fail_at(long nth, int code, int from_there_on) {
    calls = injected = 0;
    fail_at = nth;
    error_code = code;
    persistent = from_there_on;
}
EXPORT void disk_kill_at(long nth) {
    calls = 0;
    kill_at = nth;
}
EXPORT void disk_cut_reads(long bytes) { longest_read = (size_t)bytes; }
EXPORT void disk_fail_read_at(long nth, int code) {
    reads = 0;
    fail_read_at = nth;
    read_error = code;
}
EXPORT long disk_calls(void) { return calls; }
EXPORT long disk_injected(void) { return injected; }

static int is_under(const char *path) { return *folder && path && !strncmp(path, folder, strlen(folder)); }

static int is_ours(int fd) {
    char link[64], path[4096];
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_under(path);
}

enum { GO_ON, FAIL, KILL };

static int next_call(void) {
    calls++;
    if (kill_at && calls == kill_at) return KILL;
    if (fail_at && (calls == fail_at || (persistent && calls > fail_at))) {
        injected++;
        return FAIL;
    }
    return GO_ON;
}

/* Returns 1 where the call is to fail; does not return where the process is to die. */
static int refused(void) {
    int what = next_call();
    if (what == KILL) kill(getpid(), SIGKILL);
    if (what == FAIL) errno = error_code;
    return what == FAIL;
}

static int refused_halfway(int fd, const void *bytes, size_t count, off_t offset) {
    int what = next_call();
    if (what == GO_ON) return 0;
    if (offset < 0)
        (void)!REAL(write)(fd, bytes, count / 2);
    else
        (void)!REAL(pwrite)(fd, bytes, count / 2, offset);
    if (what == KILL) kill(getpid(), SIGKILL);
    errno = error_code;
    return 1;
}

EXPORT ssize_t write(int fd, const void *bytes, size_t count) {
    if (is_ours(fd) && refused_halfway(fd, bytes, count, -1)) return -1;
    return REAL(write)(fd, bytes, count);
}
EXPORT ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
    if (is_ours(fd) && refused_halfway(fd, bytes, count, offset)) return -1;
    return REAL(pwrite)(fd, bytes, count, offset);
}
EXPORT ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t offset) {
    return pwrite(fd, bytes, count, offset);
}
EXPORT int fsync(int fd) { return is_ours(fd) && refused() ? -1 : REAL(fsync)(fd); }
EXPORT int fdatasync(int fd) { return is_ours(fd) && refused() ? -1 : REAL(fdatasync)(fd); }
EXPORT int ftruncate(int fd, off_t length) { return is_ours(fd) && refused() ? -1 : REAL(ftruncate)(fd, length); }
EXPORT int rename(const char *old, const char *new) { return is_under(new) && refused() ? -1 : REAL(rename)(old, new); }
EXPORT int mkdir(const char *path, mode_t mode) { return is_under(path) && refused() ? -1 : REAL(mkdir)(path, mode); }
EXPORT int symlink(const char *to, const char *path) { return is_under(path) && refused() ? -1 : REAL(symlink)(to, path); }

static int opened(const char *path, int flags, mode_t mode) {
    if ((flags & O_CREAT) && is_under(path) && refused()) return -1;
    return REAL(open)(path, flags, mode);
}

#define OPEN(name)                                   \
    EXPORT int name(const char *path, int flags, ...) { \
        mode_t mode = 0;                             \
        if (flags & O_CREAT) {                       \
            va_list rest;                            \
            va_start(rest, flags);                   \
            mode = va_arg(rest, mode_t);             \
            va_end(rest);                            \
        }                                            \
        return opened(path, flags, mode);            \
    }
OPEN(open)
OPEN(open64)

EXPORT ssize_t read(int fd, void *bytes, size_t count) {
    if ((longest_read || fail_read_at) && is_ours(fd)) {
        if (fail_read_at && ++reads >= fail_read_at) {
            injected++;
            errno = read_error;
            return -1;
        }
        if (longest_read && count > longest_read) count = longest_read;
    }
    return REAL(read)(fd, bytes, count);
}

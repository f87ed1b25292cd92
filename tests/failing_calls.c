/* Lets one call on files under a folder fail, as a full or broken disk does. Loaded with LD_PRELOAD.
 *
 * fail_calls(folder, at, error, stays): of the calls that can fail with `error`, the one numbered `at` (from 0) does, and
 * with `stays` every one after it, as on a disk that is full. Calls on files elsewhere are neither counted nor failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, READ, WRITE, SYNC, RENAME, MAKE, UNLINK };

static const struct { int error; int kinds; } CAN_FAIL[] = {
    {EIO, 1 << OPEN | 1 << CREATE | 1 << READ | 1 << WRITE | 1 << SYNC | 1 << RENAME | 1 << MAKE | 1 << UNLINK},
    {ENOSPC, 1 << CREATE | 1 << WRITE | 1 << SYNC | 1 << RENAME | 1 << MAKE},
    {EDQUOT, 1 << CREATE | 1 << WRITE | 1 << SYNC | 1 << MAKE},
    {EROFS, 1 << CREATE | 1 << RENAME | 1 << MAKE | 1 << UNLINK},
    {EMFILE, 1 << OPEN | 1 << CREATE},
};

static char folder[4096];
static long first = -1;
static int error_number, stays_failed;
static atomic_long num_calls;

void fail_calls(const char *under, long at, int error, int stays) {
    strncpy(folder, under, sizeof folder - 1);
    first = at;
    error_number = error;
    stays_failed = stays;
    atomic_store(&num_calls, 0);
}

long calls(void) { return atomic_load(&num_calls); }

static int is_under(const char *path) {
    size_t length = strlen(folder);
    return length && path && !strncmp(path, folder, length) && (path[length] == '/' || path[length] == 0);
}

static const char *path_at(int directory, const char *path, char *full) {
    char link[64], base[4096];
    ssize_t length;
    if (!path) return NULL;
    if (path[0] == '/') return path;
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return NULL;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        length = readlink(link, base, sizeof base - 1);
        if (length < 0) return NULL;
        base[length] = 0;
    }
    snprintf(full, 8192, "%s/%s", base, path);
    return full;
}

static int fails(enum kind kind, const char *path) {
    if (!folder[0] || !is_under(path)) return 0;
    for (size_t i = 0; i < sizeof CAN_FAIL / sizeof *CAN_FAIL; i++)
        if (CAN_FAIL[i].error == error_number) {
            if (!(CAN_FAIL[i].kinds & 1 << kind)) return 0;
            long number = atomic_fetch_add(&num_calls, 1);
            if (first < 0 || number < first || (number > first && !stays_failed)) return 0;
            errno = error_number;
            return 1;
        }
    return 0;
}

static int fails_at(enum kind kind, int directory, const char *path) {
    char full[8192];
    return folder[0] ? fails(kind, path_at(directory, path, full)) : 0;
}

static int fails_fd(enum kind kind, int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPENS(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) ? CREATE : OPEN)
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); }

int open(const char *path, int flags, ...) { MODE(flags) return fails_at(OPENS(flags), AT_FDCWD, path) ? -1 : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return fails_at(OPENS(flags), AT_FDCWD, path) ? -1 : REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return fails_at(OPENS(flags), at, path) ? -1 : REAL(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return fails_at(OPENS(flags), at, path) ? -1 : REAL(openat64)(at, path, flags, mode); }
ssize_t read(int fd, void *to, size_t n) { return fails_fd(READ, fd) ? -1 : REAL(read)(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t from) { return fails_fd(READ, fd) ? -1 : REAL(pread)(fd, to, n, from); }
ssize_t pread64(int fd, void *to, size_t n, off64_t from) { return fails_fd(READ, fd) ? -1 : REAL(pread64)(fd, to, n, from); }
ssize_t write(int fd, const void *from, size_t n) { return fails_fd(WRITE, fd) ? -1 : REAL(write)(fd, from, n); }
ssize_t pwrite(int fd, const void *from, size_t n, off_t to) { return fails_fd(WRITE, fd) ? -1 : REAL(pwrite)(fd, from, n, to); }
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t to) { return fails_fd(WRITE, fd) ? -1 : REAL(pwrite64)(fd, from, n, to); }
ssize_t writev(int fd, const struct iovec *from, int n) { return fails_fd(WRITE, fd) ? -1 : REAL(writev)(fd, from, n); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned flags) { return fails_fd(WRITE, out) ? -1 : REAL(copy_file_range)(in, a, out, b, n, flags); }
int ftruncate(int fd, off_t size) { return fails_fd(WRITE, fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fails_fd(WRITE, fd) ? -1 : REAL(ftruncate64)(fd, size); }
int fsync(int fd) { return fails_fd(SYNC, fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fails_fd(SYNC, fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) { return fails_at(RENAME, AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return fails_at(RENAME, b, to) ? -1 : REAL(renameat)(a, from, b, to); }
int mkdir(const char *path, mode_t mode) { return fails_at(MAKE, AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { return fails_at(MAKE, at, path) ? -1 : REAL(mkdirat)(at, path, mode); }
int unlink(const char *path) { return fails_at(UNLINK, AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { return fails_at(UNLINK, at, path) ? -1 : REAL(unlinkat)(at, path, flags); }
int rmdir(const char *path) { return fails_at(UNLINK, AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }

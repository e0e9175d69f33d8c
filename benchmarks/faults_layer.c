/* A layer between a process and its files, for benchmarks/faults.py: LD_PRELOAD puts it before libc.

   Once armed it counts the calls that touch a path beneath one folder, and at the n-th does what it was asked to: fails,
   fails from there on, gives half of the bytes, is interrupted, kills the process before or after the call, or changes a
   file behind its back. What libc does inside itself (fread of a FILE) is not seen; mapped memory neither. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN_READ = 1, READ = 2, MAP = 4, OPEN_WRITE = 8, WRITE = 16, ALLOCATE = 32, SYNC = 64, NAME = 128, CLOSE = 256 };
enum { FAIL = 1, FAIL_ON, HALF, INTERRUPT, KILL_BEFORE, KILL_AFTER, SWAP };

static atomic_int armed, action, error, fired;
static atomic_uint mask;
static atomic_long seen, at;
static char root[PATH_MAX], victim[PATH_MAX], with[PATH_MAX], swap, story[PATH_MAX + 64];
static size_t root_length;
static __thread int inside;
#define FILES 65536
static atomic_uchar watched[FILES];
static const char *const names[] = {"open", "read", "mmap", "create", "write", "allocate", "fsync", "rename or unlink", "close"};

/* swap: 0 none, 'r' `with` is renamed over `victim`, 'o' its bytes are written into it, 't' it is cut to half, 'd' it is
   removed. `with` must be another name for a file that may be used up. */
void faults_arm(const char *folder, unsigned ops, long nth, int what, int number) {
    root_length = strlen(strcpy(root, folder));
    mask = ops;
    at = nth;
    action = what;
    error = number;
    seen = fired = story[0] = 0;
    armed = 1;
}
void faults_swap(const char *file, const char *other, char how) {
    strcpy(victim, file);
    strcpy(with, other);
    swap = how;
}
void faults_disarm(void) { armed = 0; }
long faults_seen(void) { return seen; }
int faults_fired(void) { return fired; }
const char *faults_story(void) { return story; }

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

static void change_file(void) {
    char data[65536];
    struct stat found;
    if (swap == 'r') rename(with, victim);
    if (swap == 'd') unlink(victim);
    if (swap == 't' && !stat(victim, &found) && truncate(victim, found.st_size / 2)) abort();
    if (swap == 'o') {
        int from = open(with, O_RDONLY), to = open(victim, O_WRONLY);
        for (ssize_t count; (count = read(from, data, sizeof data)) > 0;)
            if (write(to, data, count) != count) abort();
        close(from);
        close(to);
    }
}

static int below(const char *path) {
    char full[PATH_MAX];
    if (!armed || inside || !path) return 0;
    if (path[0] != '/') {
        inside = 1;
        char *here = getcwd(full, sizeof full);
        inside = 0;
        if (!here || strlen(full) + strlen(path) + 2 > sizeof full) return 0;
        strcat(strcat(full, "/"), path[0] == '.' && path[1] == '/' ? path + 2 : path);
        path = full;
    }
    return !strncmp(path, root, root_length);
}

/* Whether this call is to go wrong: 0 no, else the action. HALF and KILL_AFTER are left to the caller. */
static int goes_wrong(unsigned op, const char *path) {
    if (!(mask & op)) return 0;
    long n = ++seen;
    if (action == 0 || !(n == at || (n > at && (action == FAIL_ON || action == HALF)))) return 0;
    if (n == at) {
        fired = 1;
        inside = 1;
        snprintf(story, sizeof story, "%s %s", names[__builtin_ctz(op)], path ? path : "");
        if (action == KILL_BEFORE) kill(0, SIGKILL);
        if (action == SWAP) change_file();
        inside = 0;
    }
    return action == SWAP ? 0 : action;
}

static int wrong_file(unsigned op, int file) {
    if (!armed || inside || file < 0 || file >= FILES || !watched[file]) return 0;
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t count = seen + 1 == at ? readlink(link, path, sizeof path - 1) : 0;
    if (count > 0) path[count] = 0;
    return goes_wrong(op, path);
}

static void die(int what) {
    if (what == KILL_AFTER) kill(0, SIGKILL);
}
static int fails(int what) {
    if (what != FAIL && what != FAIL_ON && what != INTERRUPT) return 0;
    errno = what == INTERRUPT ? EINTR : error;
    return 1;
}

static int opened(int file, const char *path, int what) {
    if (file >= 0 && file < FILES) watched[file] = below(path);
    die(what);
    return file;
}
static unsigned open_op(int flags) {
    return !(flags & O_CREAT) && (flags & O_ACCMODE) == O_RDONLY ? OPEN_READ : OPEN_WRITE;
}
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list more; \
        va_start(more, flags); \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more); \
        int what = below(path) ? goes_wrong(open_op(flags), path) : 0; \
        return fails(what) ? -1 : opened(real(path, flags, mode), path, what); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list more; \
        va_start(more, flags); \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more); \
        int here = folder == AT_FDCWD || path[0] == '/'; \
        int what = here && below(path) ? goes_wrong(open_op(flags), path) : 0; \
        return fails(what) ? -1 : opened(real(folder, path, flags, mode), here ? path : NULL, what); \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        int what = below(path) ? goes_wrong(mode[0] == 'r' && !strchr(mode, '+') ? OPEN_READ : OPEN_WRITE, path) : 0; \
        if (fails(what)) return NULL; \
        FILE *made = real(path, mode); \
        if (made) opened(fileno(made), path, what); \
        return made; \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Reads and writes: `size` may be halved. */
#define ONE(name, op, type) \
    ssize_t name(int file, type data, size_t size) { \
        REAL(ssize_t, #name, int, type, size_t); \
        int what = wrong_file(op, file); \
        if (fails(what)) return -1; \
        ssize_t done = real(file, data, what == HALF && size > 1 ? size / 2 : size); \
        die(what); \
        return done; \
    }
ONE(read, READ, void *)
ONE(write, WRITE, const void *)
#define AT(name, op, type) \
    ssize_t name(int file, type data, size_t size, off_t place) { \
        REAL(ssize_t, #name, int, type, size_t, off_t); \
        int what = wrong_file(op, file); \
        if (fails(what)) return -1; \
        ssize_t done = real(file, data, what == HALF && size > 1 ? size / 2 : size, place); \
        die(what); \
        return done; \
    }
AT(pread, READ, void *)
AT(pread64, READ, void *)
AT(pwrite, WRITE, const void *)
AT(pwrite64, WRITE, const void *)
/* Of several pieces the first one is halved, and the only one. */
#define PIECES(name, op, arguments, given) \
    ssize_t name arguments { \
        REAL(ssize_t, #name, int, const struct iovec *, int, off_t); \
        int what = wrong_file(op, file); \
        if (fails(what)) return -1; \
        struct iovec half = pieces[0]; \
        if (what == HALF && half.iov_len > 1) half.iov_len /= 2, pieces = &half, count = 1; \
        ssize_t done = real given; \
        die(what); \
        return done; \
    }
PIECES(preadv, READ, (int file, const struct iovec *pieces, int count, off_t place), (file, pieces, count, place))
PIECES(preadv64, READ, (int file, const struct iovec *pieces, int count, off_t place), (file, pieces, count, place))
PIECES(pwritev, WRITE, (int file, const struct iovec *pieces, int count, off_t place), (file, pieces, count, place))
PIECES(pwritev64, WRITE, (int file, const struct iovec *pieces, int count, off_t place), (file, pieces, count, place))
PIECES(readv, READ, (int file, const struct iovec *pieces, int count), (file, pieces, count, 0))
PIECES(writev, WRITE, (int file, const struct iovec *pieces, int count), (file, pieces, count, 0))
#define COPY(name, op, to, arguments, types, given) \
    ssize_t name arguments { \
        REAL(ssize_t, #name, types); \
        int what = wrong_file(op, to); \
        if (fails(what)) return -1; \
        ssize_t done = real given; \
        die(what); \
        return done; \
    }
#define TYPES int, int, off_t *, size_t
COPY(sendfile, WRITE, to, (int to, int from, off_t *place, size_t size), TYPES, (to, from, place, size))
COPY(sendfile64, WRITE, to, (int to, int from, off_t *place, size_t size), TYPES, (to, from, place, size))

#define MMAP(name) \
    void *name(void *place, size_t size, int protection, int flags, int file, off_t offset) { \
        REAL(void *, #name, void *, size_t, int, int, int, off_t); \
        int what = wrong_file(MAP, file); \
        if (fails(what)) return MAP_FAILED; \
        void *made = real(place, size, protection, flags, file, offset); \
        die(what); \
        return made; \
    }
MMAP(mmap)
MMAP(mmap64)

#define FILE_CALL(name, op, arguments, types, given) \
    int name arguments { \
        REAL(int, #name, types); \
        int what = wrong_file(op, file); \
        if (fails(what)) return -1; \
        int done = real given; \
        die(what); \
        return done; \
    }
#define SIZED int, off_t
FILE_CALL(fsync, SYNC, (int file), int, (file))
FILE_CALL(fdatasync, SYNC, (int file), int, (file))
FILE_CALL(ftruncate, ALLOCATE, (int file, off_t size), SIZED, (file, size))
FILE_CALL(ftruncate64, ALLOCATE, (int file, off_t size), SIZED, (file, size))
#define FALLOCATE(name) \
    int name(int file, off_t place, off_t size) { \
        REAL(int, #name, int, off_t, off_t); \
        int what = wrong_file(ALLOCATE, file); \
        if (fails(what)) return errno; \
        int done = real(file, place, size); \
        die(what); \
        return done; \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

int close(int file) {
    REAL(int, "close", int);
    int what = wrong_file(CLOSE, file);
    if (file >= 0 && file < FILES && !inside) watched[file] = 0;
    int done = real(file);
    die(what);
    return fails(what) ? -1 : done;
}

#define NAME_CALL(name, op, arguments, types, path, given) \
    int name arguments { \
        REAL(int, #name, types); \
        int what = below(path) ? goes_wrong(op, path) : 0; \
        if (fails(what)) return -1; \
        int done = real given; \
        die(what); \
        return done; \
    }
#define TWO const char *, const char *
#define MODE const char *, mode_t
#define FLAGS int, const char *, int
#define FOUR int, const char *, int, const char *
NAME_CALL(rename, NAME, (const char *from, const char *to), TWO, to, (from, to))
NAME_CALL(renameat, NAME, (int a, const char *from, int b, const char *to), FOUR, to, (a, from, b, to))
NAME_CALL(unlink, NAME, (const char *path), const char *, path, (path))
NAME_CALL(rmdir, NAME, (const char *path), const char *, path, (path))
NAME_CALL(unlinkat, NAME, (int at_, const char *path, int flags), FLAGS, path, (at_, path, flags))
NAME_CALL(mkdir, OPEN_WRITE, (const char *path, mode_t mode), MODE, path, (path, mode))

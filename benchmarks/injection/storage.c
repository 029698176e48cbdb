/* Storage that refuses: while the number in $FAULT_CONTROL is not 0, calls on what lies below $FAULT_PREFIX fail
   with it as errno. Calls that only read fail with EIO alone. Loaded by LD_PRELOAD; see storage.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile int *control;
static const char *prefix;

__attribute__((constructor)) static void load(void) {
  const char *file = getenv("FAULT_CONTROL");
  prefix = getenv("FAULT_PREFIX");
  if (!file || !prefix) return;
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  int descriptor = real(file, O_RDONLY);
  if (descriptor < 0) return;
  void *at = mmap(0, sizeof(int), PROT_READ, MAP_SHARED, descriptor, 0);
  if (at != MAP_FAILED) control = at;
  close(descriptor);
}

static int refuses(const char *path, int reads) {
  int code = control ? *control : 0;
  if (!code || (reads && code != EIO) || strncmp(path, prefix, strlen(prefix))) return 0;
  errno = code;
  return 1;
}

static int refuses_descriptor(int descriptor) {
  char link[64], path[4096];
  if (!control || !*control) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return refuses(path, 0);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                     \
  int name(const char *path, int flags, ...) {                                         \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    REAL(name);                                                                        \
    return refuses(path, !(flags & (O_WRONLY | O_RDWR | O_CREAT))) ? -1 : real(path, flags, mode); \
  }
#define OPENAT(name)                                                                   \
  int name(int at, const char *path, int flags, ...) {                                 \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    REAL(name);                                                                        \
    return refuses(path, !(flags & (O_WRONLY | O_RDWR | O_CREAT))) ? -1 : real(at, path, flags, mode); \
  }
#define ON_DESCRIPTOR(type, name, parameters, ...)                                     \
  type name parameters { REAL(name); return refuses_descriptor(descriptor) ? -1 : real(__VA_ARGS__); }
#define ON_PATH(name, parameters, ...)                                                 \
  int name parameters { REAL(name); return refuses(path, 0) ? -1 : real(__VA_ARGS__); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *data, size_t size), descriptor, data, size)
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at), descriptor, data, size, at)
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t at), descriptor, data, size, at)
ON_DESCRIPTOR(ssize_t, writev, (int descriptor, const struct iovec *data, int count), descriptor, data, count)
ON_DESCRIPTOR(ssize_t, pwritev, (int descriptor, const struct iovec *data, int count, off_t at), descriptor, data, count, at)
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t size), descriptor, size)
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t size), descriptor, size)
ON_DESCRIPTOR(int, fsync, (int descriptor), descriptor)
ON_DESCRIPTOR(int, fdatasync, (int descriptor), descriptor)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, (int at, const char *path, mode_t mode), at, path, mode)
ON_PATH(rename, (const char *path, const char *to), path, to)
ON_PATH(renameat, (int at, const char *path, int at_to, const char *to), at, path, at_to, to)
ON_PATH(link, (const char *path, const char *to), path, to)

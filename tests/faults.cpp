// What a disk may do to a process, for the files below one directory: preloaded, it counts the operations
// that change them and lets the n-th one fail, lets all fail from then on, or ends the process in the middle
// of it.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace {

enum Mode { COUNT, FAIL_ONCE, FAIL_FROM, KILL };

std::string directory;
std::atomic<bool> armed{false};
std::atomic<long> made{0};
long limit = 0;
int mode = COUNT, error_number = EIO;

template <typename F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

bool below(const std::string& path) { return path.compare(0, directory.size(), directory) == 0; }

std::string path_of(int descriptor) {
  char link[64], target[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, target, sizeof target);
  return size > 0 ? std::string(target, size) : std::string();
}

std::string path_at(int folder, const char* path) {
  if (path[0] == '/') return path;
  if (folder == AT_FDCWD) {
    char cwd[PATH_MAX];
    return std::string(getcwd(cwd, sizeof cwd) ? cwd : "") + "/" + path;
  }
  return path_of(folder) + "/" + path;
}

// Whether the operation that changes `path` is to fail, which is then said in errno. `partly` does a part of
// it.
template <typename Partly>
bool fails(const std::string& path, Partly partly) {
  if (!below(path)) return false;
  long number = ++made;
  if (mode == COUNT || number < limit || (mode == FAIL_ONCE && number > limit)) return false;
  if (number == limit) partly();
  if (mode == KILL) kill(getpid(), SIGKILL);
  errno = error_number;
  return true;
}

bool fails(const std::string& path) {
  return fails(path, [] {});
}

}  // namespace

extern "C" {

void faults_arm(const char* below_directory, long number, int how, int error) {
  directory = below_directory, limit = number, mode = how, error_number = error;
  made = 0, armed = true;
}

long faults_made() { return made; }

void faults_disarm() { armed = false; }

#define OPEN(name, folder, ...)                                      \
  {                                                                  \
    mode_t permissions = 0;                                          \
    if (flags & (O_CREAT | O_TMPFILE)) {                             \
      va_list more;                                                  \
      va_start(more, flags);                                         \
      permissions = va_arg(more, mode_t);                            \
      va_end(more);                                                  \
    }                                                                \
    bool changes = flags & (O_CREAT | O_TRUNC);                      \
    if (armed && changes && fails(path_at(folder, path))) return -1; \
    static auto real = next<int(__VA_ARGS__, ...)>(#name);           \
    return CALL(real, permissions);                                  \
  }

#define CALL(real, permissions) real(path, flags, permissions)
int open(const char* path, int flags, ...)
    OPEN(open, AT_FDCWD, const char*, int) int open64(const char* path, int flags, ...)
        OPEN(open64, AT_FDCWD, const char*, int)
#undef CALL
#define CALL(real, permissions) real(folder, path, flags, permissions)
            int openat(int folder, const char* path, int flags, ...)
                OPEN(openat, folder, int, const char*, int) int openat64(int folder, const char* path,
                                                                         int flags, ...)
                    OPEN(openat64, folder, int, const char*, int)
#undef CALL

                        ssize_t write(int descriptor, const void* data, size_t size) {
  static auto real = next<ssize_t(int, const void*, size_t)>("write");
  if (armed && fails(path_of(descriptor), [&] { real(descriptor, data, size / 2); })) return -1;
  return real(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  static auto real = next<ssize_t(int, const struct iovec*, int)>("writev");
  if (armed && fails(path_of(descriptor), [&] { real(descriptor, parts, count / 2); })) return -1;
  return real(descriptor, parts, count);
}

ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t offset) {
  static auto real = next<ssize_t(int, const void*, size_t, off64_t)>("pwrite64");
  if (armed && fails(path_of(descriptor), [&] { real(descriptor, data, size / 2, offset); })) return -1;
  return real(descriptor, data, size, offset);
}

// Operations on a descriptor, on a path and on a path in a folder.
#define ON_DESCRIPTOR(name)                             \
  int name(int descriptor) {                            \
    static auto real = next<int(int)>(#name);           \
    if (armed && fails(path_of(descriptor))) return -1; \
    return real(descriptor);                            \
  }
ON_DESCRIPTOR(fsync)
ON_DESCRIPTOR(fdatasync)

#define ON_PATH(name)                                       \
  int name(const char* path) {                              \
    static auto real = next<int(const char*)>(#name);       \
    if (armed && fails(path_at(AT_FDCWD, path))) return -1; \
    return real(path);                                      \
  }
ON_PATH(unlink)
ON_PATH(rmdir)

int ftruncate64(int descriptor, off64_t size) {
  static auto real = next<int(int, off64_t)>("ftruncate64");
  if (armed && fails(path_of(descriptor))) return -1;
  return real(descriptor, size);
}

int unlinkat(int folder, const char* path, int flags) {
  static auto real = next<int(int, const char*, int)>("unlinkat");
  if (armed && fails(path_at(folder, path))) return -1;
  return real(folder, path, flags);
}

int mkdir(const char* path, mode_t permissions) {
  static auto real = next<int(const char*, mode_t)>("mkdir");
  if (armed && fails(path_at(AT_FDCWD, path))) return -1;
  return real(path, permissions);
}

int rename(const char* from, const char* to) {
  static auto real = next<int(const char*, const char*)>("rename");
  if (armed && fails(path_at(AT_FDCWD, to))) return -1;
  return real(from, to);
}

int renameat(int from_folder, const char* from, int to_folder, const char* to) {
  static auto real = next<int(int, const char*, int, const char*)>("renameat");
  if (armed && fails(path_at(to_folder, to))) return -1;
  return real(from_folder, from, to_folder, to);
}

int link(const char* from, const char* to) {
  static auto real = next<int(const char*, const char*)>("link");
  if (armed && fails(path_at(AT_FDCWD, to))) return -1;
  return real(from, to);
}

int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) {
  static auto real = next<int(int, const char*, int, const char*, int)>("linkat");
  if (armed && fails(path_at(to_folder, to))) return -1;
  return real(from_folder, from, to_folder, to, flags);
}

}  // extern "C"

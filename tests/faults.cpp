// What a disk may do to a process, for the files below one directory: preloaded, this stands before the C
// library's functions that change files, counts and lists the changes, and lets the n-th fail, lets all fail
// from then on, or ends the process in the middle of it.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
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
int mode = COUNT, error_number = EIO, list = -1;

std::string path_of(int descriptor) {
  char link[64], target[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, target, sizeof target);
  return size > 0 ? std::string(target, size) : std::string();
}

std::string path_at(int folder, const char* path) {
  if (path[0] == '/') return path;
  char cwd[PATH_MAX];
  std::string base = folder != AT_FDCWD ? path_of(folder) : getcwd(cwd, sizeof cwd) ? cwd : "";
  return base + "/" + path;
}

std::string path_at(const char* path) { return path_at(AT_FDCWD, path); }

// Whether an operation that changes `path` is to fail, which errno then says why. `partly` does a part of it.
template <typename Partly>
bool fails(const char* operation, const std::string& path, const std::string& from, Partly partly) {
  if (path.compare(0, directory.size(), directory) != 0) return false;
  long number = ++made;
  if (list >= 0) {
    std::string line = operation + ("\t" + path) + "\t" + from + "\n";
    syscall(SYS_write, list, line.data(), line.size());  // not to be counted
  }
  if (mode == COUNT || number < limit || (mode == FAIL_ONCE && number > limit)) return false;
  if (number == limit) partly();
  if (mode == KILL) kill(getpid(), SIGKILL);
  errno = error_number;
  return true;
}

bool fails(const char* operation, const std::string& path, const std::string& from = "") {
  return fails(operation, path, from, [] {});
}

}  // namespace

extern "C" {

// `below` is absolute; `list_of` is a file for a line for each change, or empty.
void faults_arm(const char* below, long number, int how, int error, const char* list_of) {
  directory = below, limit = number, mode = how, error_number = error, made = 0;
  list = list_of[0] ? open(list_of, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
  armed = true;
}

long faults_disarm() {
  armed = false;
  if (list >= 0) close(list);
  return made;
}

}  // extern "C"

// The function that the program calls `name`, and the C library's own as `real`.
#define BEFORE(name, result, ...)                              \
  extern "C" result before_##name(__VA_ARGS__) __asm__(#name); \
  result before_##name(__VA_ARGS__)
#define REAL(name, ...) static auto real = reinterpret_cast<__VA_ARGS__>(dlsym(RTLD_NEXT, #name))

#define BEFORE_OPEN(name)                                                                          \
  BEFORE(name, int, const char* path, int flags, mode_t permissions) {                             \
    REAL(name, int (*)(const char*, int, ...));                                                    \
    bool changes = flags & (O_CREAT | O_TRUNC);                                                    \
    return armed && changes && fails("open", path_at(path)) ? -1 : real(path, flags, permissions); \
  }
BEFORE_OPEN(open)
BEFORE_OPEN(open64)

#define BEFORE_OPENAT(name)                                                        \
  BEFORE(name, int, int folder, const char* path, int flags, mode_t permissions) { \
    REAL(name, int (*)(int, const char*, int, ...));                               \
    bool changes = flags & (O_CREAT | O_TRUNC);                                    \
    if (armed && changes && fails("open", path_at(folder, path))) return -1;       \
    return real(folder, path, flags, permissions);                                 \
  }
BEFORE_OPENAT(openat)
BEFORE_OPENAT(openat64)

BEFORE(write, ssize_t, int file, const void* data, size_t size) {
  REAL(write, ssize_t (*)(int, const void*, size_t));
  if (armed && fails("write", path_of(file), "", [&] { real(file, data, size / 2); })) return -1;
  return real(file, data, size);
}

BEFORE(writev, ssize_t, int file, const struct iovec* parts, int count) {
  REAL(writev, ssize_t (*)(int, const struct iovec*, int));
  if (armed && fails("write", path_of(file), "", [&] { real(file, parts, count / 2); })) return -1;
  return real(file, parts, count);
}

BEFORE(pwrite64, ssize_t, int file, const void* data, size_t size, off64_t offset) {
  REAL(pwrite64, ssize_t (*)(int, const void*, size_t, off64_t));
  if (armed && fails("write", path_of(file), "", [&] { real(file, data, size / 2, offset); })) return -1;
  return real(file, data, size, offset);
}

BEFORE(ftruncate64, int, int file, off64_t size) {
  REAL(ftruncate64, int (*)(int, off64_t));
  return armed && fails("write", path_of(file)) ? -1 : real(file, size);
}

BEFORE(fsync, int, int file) {
  REAL(fsync, int (*)(int));
  return armed && fails("fsync", path_of(file)) ? -1 : real(file);
}

BEFORE(unlink, int, const char* path) {
  REAL(unlink, int (*)(const char*));
  return armed && fails("unlink", path_at(path)) ? -1 : real(path);
}

BEFORE(unlinkat, int, int folder, const char* path, int flags) {
  REAL(unlinkat, int (*)(int, const char*, int));
  return armed && fails("unlink", path_at(folder, path)) ? -1 : real(folder, path, flags);
}

BEFORE(rmdir, int, const char* path) {
  REAL(rmdir, int (*)(const char*));
  return armed && fails("unlink", path_at(path)) ? -1 : real(path);
}

BEFORE(mkdir, int, const char* path, mode_t permissions) {
  REAL(mkdir, int (*)(const char*, mode_t));
  return armed && fails("mkdir", path_at(path)) ? -1 : real(path, permissions);
}

BEFORE(rename, int, const char* from, const char* to) {
  REAL(rename, int (*)(const char*, const char*));
  return armed && fails("rename", path_at(to), path_at(from)) ? -1 : real(from, to);
}

BEFORE(link, int, const char* from, const char* to) {
  REAL(link, int (*)(const char*, const char*));
  return armed && fails("link", path_at(to), path_at(from)) ? -1 : real(from, to);
}

BEFORE(linkat, int, int from_folder, const char* from, int to_folder, const char* to, int flags) {
  REAL(linkat, int (*)(int, const char*, int, const char*, int));
  if (armed && fails("link", path_at(to_folder, to), path_at(from_folder, from))) return -1;
  return real(from_folder, from, to_folder, to, flags);
}

// Letters between processes of one machine, as files of /dev/shm that are mapped by who reads them.
#include "letters.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rehearsal {
namespace {

struct Head {
  std::atomic<int> readers;
};
constexpr size_t kHead = 64;

char* map(const std::string& path, int flags, size_t bytes) {
  const int file = open(path.c_str(), flags, 0600);
  if (file < 0 || ((flags & O_CREAT) && ftruncate(file, bytes) != 0)) {
    std::perror(("rehearsal device: " + path).c_str());
    std::abort();
  }
  void* place = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (place == MAP_FAILED) {
    std::perror(("rehearsal device: " + path).c_str());
    std::abort();
  }
  return static_cast<char*>(place);
}

}  // namespace

void post(const std::string& path, const void* data, size_t bytes, int readers) {
  const std::string draft = path + ".draft";
  char* letter = map(draft, O_CREAT | O_RDWR | O_EXCL, kHead + bytes);
  new (letter) Head{{readers}};
  if (bytes > 0) std::memcpy(letter + kHead, data, bytes);
  munmap(letter, kHead + bytes);
  std::rename(draft.c_str(), path.c_str());
}

bool arrived(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

void read(const std::string& path, size_t bytes, const std::function<void(const char*)>& look) {
  char* letter = map(path, O_RDWR, kHead + bytes);
  look(letter + kHead);
  if (reinterpret_cast<Head*>(letter)->readers.fetch_sub(1) == 1) unlink(path.c_str());
  munmap(letter, kHead + bytes);
}

}  // namespace rehearsal

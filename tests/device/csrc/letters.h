// Letters between processes of one machine: files in shared memory, complete as soon as they exist.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace rehearsal {

// Write a letter that `readers` processes will read; the last of them removes it.
void post(const std::string& path, const void* data, size_t bytes, int readers);
bool arrived(const std::string& path);
// Show a letter that has arrived to `look`, and be done with it.
void read(const std::string& path, size_t bytes, const std::function<void(const char*)>& look);

}  // namespace rehearsal

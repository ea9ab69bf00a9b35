// Collectives through shared memory: each is a piece of work in a stream's queue.
//
// Sums round to the type of the numbers after every rank's, from rank 0 on, the same on all ranks.
#include "collectives.h"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "letters.h"
#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/common/float16.h"
#include "streams.h"

// A communicator, with the number of its next collective and of letters from one rank to another.
struct C_CCLComm_st {
  size_t rank, ranks;
  std::string name;
  uint64_t collectives = 0;
  std::vector<uint64_t> sent, received;
};

namespace rehearsal {
namespace {

using Comm = C_CCLComm_st;
using std::to_string;

size_t width(C_DataType type) {
  switch (type) {
    case BOOL: case UINT8: case INT8: return 1;
    case INT16: case UINT16: case FLOAT16: case BFLOAT16: return 2;
    case INT32: case UINT32: case FLOAT32: return 4;
    default: return 8;
  }
}

template <class T>
T combined(T a, T b, C_CCLReduceOp op) {
  switch (op) {
    case MAX: return a > b ? a : b;
    case MIN: return a < b ? a : b;
    case PRODUCT: return a * b;
    default: return a + b;
  }
}

template <class T>
void fold(char* total, const char* more, size_t count, C_CCLReduceOp op) {
  for (size_t i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, total + i * sizeof(T), sizeof(T));
    std::memcpy(&b, more + i * sizeof(T), sizeof(T));
    a = combined<T>(a, b, op);
    std::memcpy(total + i * sizeof(T), &a, sizeof(T));
  }
}

template <class T>
void divide(char* total, size_t count, size_t ranks) {
  T* numbers = reinterpret_cast<T*>(total);
  for (size_t i = 0; i < count; ++i)
    numbers[i] = static_cast<T>(static_cast<float>(numbers[i]) / static_cast<float>(ranks));
}

using Fold = void (*)(char*, const char*, size_t, C_CCLReduceOp);

// Null for what NCCL does not sum either.
Fold fold_of(C_DataType type) {
  switch (type) {
    case FLOAT32: return fold<float>;
    case FLOAT64: return fold<double>;
    case FLOAT16: return fold<phi::dtype::float16>;
    case BFLOAT16: return fold<phi::dtype::bfloat16>;
    case INT8: return fold<int8_t>;
    case UINT8: case BOOL: return fold<uint8_t>;
    case INT32: return fold<int32_t>;
    case INT64: return fold<int64_t>;
    default: return nullptr;
  }
}

void average(char* total, size_t count, C_DataType type, size_t ranks) {
  if (type == FLOAT32) divide<float>(total, count, ranks);
  if (type == FLOAT64) divide<double>(total, count, ranks);
  if (type == FLOAT16) divide<phi::dtype::float16>(total, count, ranks);
  if (type == BFLOAT16) divide<phi::dtype::bfloat16>(total, count, ranks);
}

// Everybody's numbers, shown to `use` one rank after another once all have sent them.
class Collective : public Operation {
 public:
  using Use = std::function<void(size_t rank, const char* numbers)>;
  Collective(Comm* comm, std::string name, const void* mine, size_t bytes, size_t others, Use use)
      : comm_(comm), name_(std::move(name)), number_(comm->collectives++), mine_(mine),
        bytes_(bytes), others_(others), use_(std::move(use)) {}

  void offer() override {
    if (offered_) return;
    offered_ = true;
    const char* from = static_cast<const char*>(mine_);
    kept_.assign(from, from + bytes_);  // the result may lie where the numbers lay
    if (comm_->ranks > 1) post(path(comm_->rank), from, bytes_, comm_->ranks - 1);
  }

  bool step() override {
    offer();
    for (size_t rank = 0; rank < comm_->ranks; ++rank)
      if (rank != comm_->rank && !arrived(path(rank))) return false;
    for (size_t rank = 0; rank < comm_->ranks; ++rank) {
      if (rank == comm_->rank) use_(rank, kept_.data());
      else read(path(rank), others_, [&](const char* numbers) { use_(rank, numbers); });
    }
    return true;
  }

  std::string name() const override {
    return name_ + " number " + to_string(number_) + " of " + to_string(comm_->ranks) + " ranks";
  }

 private:
  std::string path(size_t rank) const {
    return comm_->name + ".all." + to_string(number_) + "." + to_string(rank);
  }
  Comm* comm_;
  std::string name_;
  uint64_t number_;
  const void* mine_;
  size_t bytes_, others_;
  Use use_;
  std::vector<char> kept_;
  bool offered_ = false;
};

class Send : public Operation {
 public:
  Send(Comm* comm, const void* from, size_t bytes, size_t to)
      : path_(comm->name + ".to." + to_string(comm->rank) + "-" + to_string(to) + "." +
              to_string(comm->sent[to]++)),
        from_(from), bytes_(bytes) {}
  void offer() override {
    if (!std::exchange(offered_, true)) post(path_, from_, bytes_, 1);
  }
  bool step() override {
    offer();
    return true;
  }
  std::string name() const override { return "send " + path_; }

 private:
  std::string path_;
  const void* from_;
  size_t bytes_;
  bool offered_ = false;
};

class Receive : public Operation {
 public:
  Receive(Comm* comm, void* into, size_t bytes, size_t from)
      : path_(comm->name + ".to." + to_string(from) + "-" + to_string(comm->rank) + "." +
              to_string(comm->received[from]++)),
        into_(into), bytes_(bytes) {}
  bool step() override {
    if (!arrived(path_)) return false;
    read(path_, bytes_, [&](const char* numbers) { std::memcpy(into_, numbers, bytes_); });
    return true;
  }
  std::string name() const override { return "receive " + path_; }

 private:
  std::string path_;
  void* into_;
  size_t bytes_;
};

C_Status put(C_Stream stream, std::unique_ptr<Operation> operation) {
  return enqueue(reinterpret_cast<Stream*>(stream), std::move(operation)) ? C_SUCCESS : C_FAILED;
}

C_Status reduced(void* from, void* into, size_t count, C_DataType type, C_CCLReduceOp op,
                 Comm* comm, C_Stream stream, std::string name, size_t first, size_t length) {
  const Fold sum = fold_of(type);
  if (sum == nullptr) return C_ERROR;
  const size_t size = width(type);
  auto total = std::make_shared<std::vector<char>>();
  auto use = [=](size_t rank, const char* numbers) {
    if (length == 0) return;
    const char* part = numbers + first * size;
    if (rank == 0) total->assign(part, part + length * size);
    else sum(total->data(), part, length, op);
    if (rank + 1 < comm->ranks) return;
    if (op == AVG) average(total->data(), length, type, comm->ranks);
    std::memcpy(into, total->data(), length * size);
  };
  return put(stream, std::make_unique<Collective>(comm, std::move(name), from, count * size,
                                                  count * size, use));
}

C_Status all_reduce(void* from, void* into, size_t count, C_DataType type, C_CCLReduceOp op,
                    C_CCLComm comm, C_Stream stream) {
  return reduced(from, into, count, type, op, comm, stream, "all_reduce", 0, count);
}

C_Status reduce(void* from, void* into, size_t count, C_DataType type, C_CCLReduceOp op,
                size_t root, C_CCLComm comm, C_Stream stream) {
  const size_t length = comm->rank == root ? count : 0;
  return reduced(from, into, count, type, op, comm, stream, "reduce", 0, length);
}

C_Status reduce_scatter(void* from, void* into, size_t count, C_DataType type, C_CCLReduceOp op,
                        C_CCLComm comm, C_Stream stream) {
  return reduced(from, into, count * comm->ranks, type, op, comm, stream, "reduce_scatter",
                 comm->rank * count, count);
}

C_Status broadcast(void* buffer, size_t count, C_DataType type, size_t root, C_CCLComm comm,
                   C_Stream stream) {
  const size_t bytes = count * width(type);
  auto use = [=](size_t rank, const char* numbers) {
    if (rank == root && comm->rank != root) std::memcpy(buffer, numbers, bytes);
  };
  return put(stream, std::make_unique<Collective>(comm, "broadcast", buffer, bytes, bytes, use));
}

C_Status all_gather(void* from, void* into, size_t count, C_DataType type, C_CCLComm comm,
                    C_Stream stream) {
  const size_t bytes = count * width(type);
  auto use = [=](size_t rank, const char* numbers) {
    std::memcpy(static_cast<char*>(into) + rank * bytes, numbers, bytes);
  };
  return put(stream, std::make_unique<Collective>(comm, "all_gather", from, bytes, bytes, use));
}

C_Status group_start() {
  begin_group();
  return C_SUCCESS;
}

C_Status group_end() { return end_group() ? C_SUCCESS : C_FAILED; }

C_Status send(void* from, size_t count, C_DataType type, size_t to, C_CCLComm comm,
              C_Stream stream) {
  return put(stream, std::make_unique<Send>(comm, from, count * width(type), to));
}

C_Status receive(void* into, size_t count, C_DataType type, size_t from, C_CCLComm comm,
                 C_Stream stream) {
  return put(stream, std::make_unique<Receive>(comm, into, count * width(type), from));
}

C_Status all_to_all(const void** from, const size_t* counts, const C_DataType* types, void** into,
                    const size_t* incoming, const C_DataType* incoming_types, size_t, size_t ranks,
                    C_CCLComm comm, C_Stream stream) {
  begin_group();
  for (size_t rank = 0; rank < ranks; ++rank) {
    put(stream, std::make_unique<Send>(comm, from[rank], counts[rank] * width(types[rank]), rank));
    put(stream, std::make_unique<Receive>(comm, into[rank],
                                          incoming[rank] * width(incoming_types[rank]), rank));
  }
  return group_end();
}

C_Status id_size(size_t* bytes) {
  *bytes = 64;
  return C_SUCCESS;
}

// A name below REHEARSAL_SHM, which whoever starts the ranks may set and clear up, or /dev/shm.
C_Status new_id(C_CCLRootId* id) {
  uint64_t random = 0;
  std::ifstream("/dev/urandom", std::ios::binary)
      .read(reinterpret_cast<char*>(&random), sizeof(random));
  std::memset(id->data, 0, id->sz);
  std::snprintf(static_cast<char*>(id->data), id->sz, "%llx",
                static_cast<unsigned long long>(random));
  return C_SUCCESS;
}

C_Status join(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* comm) {
  const char* place = std::getenv("REHEARSAL_SHM");
  const std::string name = static_cast<const char*>(id->data);
  *comm = new Comm{rank, ranks, (place ? std::string(place) : "/dev/shm") + "/rehearsal-" + name};
  (*comm)->sent.resize(ranks);
  (*comm)->received.resize(ranks);
  return C_SUCCESS;
}

C_Status leave(C_CCLComm) { return C_SUCCESS; }  // work in queues may still name it

C_Status comm_name(C_CCLComm comm, char* name) {
  std::strncpy(name, comm->name.c_str(), 127);  // Paddle's buffer has 128
  return C_SUCCESS;
}

}  // namespace

void set_collectives(C_DeviceInterface* interface) {
  interface->xccl_get_unique_id_size = id_size;
  interface->xccl_get_unique_id = new_id;
  interface->xccl_comm_init_rank = join;
  interface->xccl_destroy_comm = leave;
  interface->xccl_get_comm_name = comm_name;
  interface->xccl_all_reduce = all_reduce;
  interface->xccl_broadcast = broadcast;
  interface->xccl_reduce = reduce;
  interface->xccl_all_gather = all_gather;
  interface->xccl_reduce_scatter = reduce_scatter;
  interface->xccl_group_start = group_start;
  interface->xccl_group_end = group_end;
  interface->xccl_send = send;
  interface->xccl_recv = receive;
  interface->xccl_all_to_all = all_to_all;
}

}  // namespace rehearsal

#include "emulator.h"

#include "entry.h"
#include "fiber_context.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kSharedLimit = 227 * 1024;
constexpr size_t kGap = 1024;
constexpr size_t kMaxBuffers = 48;
constexpr size_t kStackBytes = 192 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN as float, half and bfloat16

struct Copy {
  void* destination;
  const void* source;  // null: zeros
  size_t bytes;
};

struct Read {
  const void* source;
  std::array<std::byte, 8> bytes;
  size_t count;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Index thread;
  bool done;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
  std::vector<Read> open_reads;
  std::vector<std::vector<Read>> reads;
  void* fake_stack = nullptr;
};

// Threads in a row that meet, one for each of Slots.
template <class Slots>
struct Meeting {
  int arrived;
  int whole;  // lanes that started
  unsigned generation;
  const char* collective;
  std::array<Slots, 2> slots;
};

struct Buffer {
  size_t place, offset, bytes;
};

constexpr size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }

std::vector<Fiber> fibers;
std::vector<Meeting<Slots>> warps;
std::vector<Meeting<GroupSlots>> warp_groups;
std::vector<int> ready;
std::vector<int> at_barrier;
std::vector<Buffer> buffers;
std::array<unsigned char, kSharedLimit + kGap*(kMaxBuffers + 1)> shared_storage alignas(1024);
size_t shared_bytes_declared;
Context scheduler;
int current;
int alive;
std::string error;
Index block, grid, size;
const std::function<void()>* kernel;
std::map<const void*, Translation> translations;
int translated_launches = 0;
const char* kernel_name;
std::mt19937 generator;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, bytes);
#endif
}

void unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

void to_scheduler(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  switch_context(from.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void to_fiber(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, to.stack.get(), kStackBytes);
#endif
  switch_context(scheduler, to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*kernel)();
  Fiber& self = fibers[current];
  self.done = true;
  --alive;
  if (!at_barrier.empty()) error = "a thread returned while others of its block wait at __syncthreads";
  to_scheduler(self);
}

template <class Slots>
void start(std::vector<Meeting<Slots>>& meetings, int threads) {
  constexpr int kLanes = std::tuple_size_v<Slots>;
  for (size_t i = 0; i < meetings.size(); ++i) {
    meetings[i].arrived = 0;
    meetings[i].whole = std::min<int>(kLanes, threads - static_cast<int>(i) * kLanes);
    meetings[i].generation = 0;
  }
}

template <class Slots>
const Slots& exchange(std::vector<Meeting<Slots>>& meetings, const char* of, const char* collective, const void* data,
                      size_t bytes) {
  constexpr int kLanes = std::tuple_size_v<Slots>;
  const int me = current;
  Meeting<Slots>& meeting = meetings[me / kLanes];
  if (meeting.whole != kLanes) {
    fail(std::string(collective) + " in a " + of + " of fewer than " + std::to_string(kLanes) + " threads");
  }
  // Two sets of slots: a lane can be one collective ahead of those that have still to read, never two.
  Slots& slots = meeting.slots[meeting.generation % 2];
  std::memcpy(slots[me % kLanes].data(), data, bytes);
  if (meeting.arrived > 0 && std::strcmp(meeting.collective, collective) != 0) {
    fail(std::string("lanes of one ") + of + " meet in " + collective + " and " + meeting.collective);
  }
  meeting.collective = collective;
  if (++meeting.arrived == kLanes) {
    meeting.arrived = 0;
    ++meeting.generation;
    const int first = me / kLanes * kLanes;
    for (int i = first; i < first + kLanes; ++i) {
      if (i != me) ready.push_back(i);
    }
  } else {
    to_scheduler(fibers[me]);
  }
  return slots;
}

void run_block(int threads) {
  alive = threads;
  buffers.clear();
  at_barrier.clear();
  ready.clear();
  unpoison(shared_storage.data(), shared_storage.size());
  std::fill(shared_storage.begin(), shared_storage.end(), kPoison);
  poison(shared_storage.data(), shared_storage.size());
  start(warps, threads);
  start(warp_groups, threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.done = false;
    f.open_group.clear();
    f.groups.clear();
    f.open_reads.clear();
    f.reads.clear();
    f.fake_stack = nullptr;
    const unsigned u = static_cast<unsigned>(i);
    f.thread = {u % size.x, u / size.x % size.y, u / (size.x * size.y)};
    make_context(f.context, f.stack.get(), kStackBytes, entry);
    ready.push_back(i);
  }
  while (alive > 0) {
    if (ready.empty()) {
      error = "deadlock: threads wait at a barrier or a warp collective that the others never reach";
    } else {
      const size_t pick = generator() % ready.size();
      current = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      to_fiber(fibers[current]);
    }
    if (!error.empty()) {
      throw std::runtime_error(std::string(kernel_name) + ", block (" + std::to_string(block.x) + ", " +
                               std::to_string(block.y) + ", " + std::to_string(block.z) + "), thread " +
                               std::to_string(current) + ": " + error);
    }
  }
  for (const Buffer& b : buffers) {
    const unsigned char* gap = shared_storage.data() + b.offset + b.bytes;
    unpoison(gap, kGap);
    if (!std::all_of(gap, gap + kGap, [](unsigned char c) { return c == kPoison; })) {
      throw std::runtime_error(std::string(kernel_name) + ": a write went past the end of a shared buffer");
    }
  }
}

}  // namespace

Index thread_index() { return fibers[current].thread; }
Index block_index() { return block; }
Index block_size() { return size; }
Index grid_size() { return grid; }
int lane() { return current % kWarp; }
int lane_of_warp_group() { return current % kWarpGroup; }
void set_seed(uint32_t seed) { generator.seed(seed); }

void fail(const std::string& what) {
  error = what;
  for (;;) to_scheduler(fibers[current]);
}

void block_barrier() {
  at_barrier.push_back(current);
  if (static_cast<int>(at_barrier.size()) < alive) {
    to_scheduler(fibers[current]);
    return;
  }
  if (alive < static_cast<int>(size.x * size.y * size.z))
    fail("__syncthreads after a thread of the block has returned");
  for (int i : at_barrier) ready.push_back(i);
  at_barrier.clear();
  to_scheduler(fibers[current]);
}

const Slots& warp_exchange(const char* collective, const void* data, size_t bytes) {
  return exchange(warps, "warp", collective, data, bytes);
}
const GroupSlots& warp_group_exchange(const char* collective, const void* data, size_t bytes) {
  return exchange(warp_groups, "warp group", collective, data, bytes);
}

unsigned char* shared_base() { return shared_storage.data(); }
size_t shared_declared() { return shared_bytes_declared; }

void check_shared(const void* p, size_t bytes, const char* what) {
  const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(shared_storage.data());
  if (at < begin || at + bytes > begin + shared_storage.size()) {
    fail(std::string(what) + " past the end of shared memory");
  }
}

int shared_buffer(int ordinal, int place, int size_in_bytes) {
  const auto start = static_cast<size_t>(place), bytes = static_cast<size_t>(size_in_bytes);
  if (ordinal == static_cast<int>(buffers.size())) {
    if (buffers.size() == kMaxBuffers) fail("takes more buffers than the emulator has gaps for");
    if (place < 0 || start + bytes > shared_bytes_declared) {
      fail("takes shared memory up to byte " + std::to_string(start + bytes) + ", launched with " +
           std::to_string(shared_bytes_declared));
    }
    for (const Buffer& b : buffers) {
      if (start < b.place + b.bytes && b.place < start + bytes) fail("lays two shared buffers over each other");
    }
    const size_t offset = buffers.empty() ? kGap : buffers.back().offset + rounded(buffers.back().bytes) + kGap;
    buffers.push_back({start, offset, bytes});
    unpoison(shared_storage.data() + offset, bytes);
  }
  if (ordinal >= static_cast<int>(buffers.size()) || buffers[ordinal].bytes != bytes ||
      buffers[ordinal].place != start) {
    fail("threads of one block lay out shared memory differently");
  }
  return static_cast<int>(buffers[ordinal].offset);
}

void copy_async(void* destination, const void* source, size_t bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(destination) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fail("cp.async with an address not aligned to its size");
  }
  check_shared(destination, bytes, "cp.async");
  // The hardware may write at any time from here on, so whoever still reads the old contents must get caught.
  std::memset(destination, kPoison, bytes);
  fibers[current].open_group.push_back({destination, valid ? source : nullptr, bytes});
}

void copy_async_commit() {
  Fiber& f = fibers[current];
  f.groups.push_back(std::move(f.open_group));
  f.open_group.clear();
}

void copy_async_wait(int groups_left) {
  Fiber& f = fibers[current];
  const int deliver = static_cast<int>(f.groups.size()) - groups_left;
  for (int g = 0; g < deliver; ++g) {
    for (const Copy& c : f.groups[g]) {
      if (c.source == nullptr) {
        std::memset(c.destination, 0, c.bytes);
      } else {
        std::memcpy(c.destination, c.source, c.bytes);
      }
    }
  }
  if (deliver > 0) f.groups.erase(f.groups.begin(), f.groups.begin() + deliver);
}

void read_async(const void* source, void* into, size_t bytes) {
  Read read{source, {}, bytes};
  std::memcpy(read.bytes.data(), source, bytes);
  std::memcpy(into, source, bytes);
  fibers[current].open_reads.push_back(read);
}

void read_async_commit() {
  Fiber& f = fibers[current];
  f.reads.push_back(std::move(f.open_reads));
  f.open_reads.clear();
}

void read_async_wait(int groups_left) {
  Fiber& f = fibers[current];
  const int done = static_cast<int>(f.reads.size()) - groups_left;
  for (int g = 0; g < done; ++g) {
    for (const Read& r : f.reads[g]) {
      if (std::memcmp(r.source, r.bytes.data(), r.count) != 0) {
        fail("shared memory was written while a matrix instruction might read it");
      }
    }
  }
  if (done > 0) f.reads.erase(f.reads.begin(), f.reads.begin() + done);
}

Translation translation(const void* kernel) {
  const auto found = translations.find(kernel);
  if (found == translations.end()) return nullptr;
  ++translated_launches;
  return found->second;
}

// The kernels and grids of launches since somebody asked.
std::string launches;

void run(const char* name, dim3 grid_dim, dim3 block_dim, size_t shared_bytes, const std::function<void()>& body) {
  const int threads = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
  if (threads < 1 || threads > 1024) throw std::runtime_error(std::string(name) + ": impossible block size");
  if (shared_bytes > kSharedLimit) throw std::runtime_error(std::string(name) + ": too much shared memory");
  if (grid_dim.x == 0 || grid_dim.y == 0 || grid_dim.y > 65535 || grid_dim.z == 0 || grid_dim.z > 65535) {
    throw std::runtime_error(std::string(name) + ": impossible grid");
  }
  launches += std::string(name) + " " + std::to_string(grid_dim.x) + " " + std::to_string(grid_dim.y) + "\n";
  kernel_name = name;
  kernel = &body;
  error.clear();
  shared_bytes_declared = shared_bytes;
  grid = {grid_dim.x, grid_dim.y, grid_dim.z};
  size = {block_dim.x, block_dim.y, block_dim.z};
#if defined(__SANITIZE_ADDRESS__)
  fibers.clear();  // of a launch that failed, the stacks are poisoned
#endif
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(static_cast<size_t>(threads));
  warps = std::vector<Meeting<Slots>>(static_cast<size_t>((threads + kWarp - 1) / kWarp));
  warp_groups = std::vector<Meeting<GroupSlots>>(static_cast<size_t>((threads + kWarpGroup - 1) / kWarpGroup));
  for (block.z = 0; block.z < grid.z; ++block.z) {
    for (block.y = 0; block.y < grid.y; ++block.y) {
      for (block.x = 0; block.x < grid.x; ++block.x) run_block(threads);
    }
  }
}

}  // namespace emulator

extern "C" {

uint64_t emulate_counts[16];

// From here on, this kernel runs as its PTX says.
void emulate_translation(const void* kernel, emulator::Translation translated) {
  emulator::translations[kernel] = translated;
}

// A line each: kernel, grid.x and grid.y. They are forgotten with the next call.
const char* emulate_launches() {
  static std::string told;
  told.swap(emulator::launches);
  emulator::launches.clear();
  return told.c_str();
}

int emulate_translated_launches() { return emulator::translated_launches; }

// A translated kernel by itself.
int emulate_translated_grid(emulator::Translation translated, const unsigned (&grid)[3], unsigned threads,
                            size_t shared_bytes, const void* const* parameters, char* message, size_t bytes) {
  return guarded(
      [&] {
        emulator::run("the kernel", {grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared_bytes,
                      [&] { translated(parameters); });
      },
      message, bytes);
}
}

// What happened before what on the stand-in device: clocks of streams and of the host, and who used each block of memory when.
//
// Each stream counts its operations. A stream knows of another what an event, or a wait of the host, has told it. Two uses of a
// block of which one writes must be in an order that the later one knows. These are vector clocks (Lamport 1978, Mattern 1989).
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace standin {

using Clock = std::map<c10::StreamId, uint64_t>;  // by stream: operations that are known to be over, or to come first

inline void merge(Clock& into, const Clock& other) {
  for (const auto& [stream, time] : other) into[stream] = std::max(into[stream], time);
}

inline bool knows(const Clock& clock, c10::StreamId stream, uint64_t time) {
  auto found = clock.find(stream);
  return found != clock.end() && found->second >= time;
}

struct Block {
  size_t size = 0;
  int device = 0;
  c10::StreamId home = 0;  // the stream that it was made on, whose later blocks may take its place
  c10::StreamId writer = -1;
  uint64_t written = 0;
  Clock reads;
  std::vector<c10::StreamId> recorded;  // streams of which `record_stream` said that they use it
};

struct Event {
  Clock clock;
  c10::StreamId stream = 0;
};

struct State {
  std::recursive_mutex mutex;
  std::map<void*, Block> blocks;    // of the device
  std::map<void*, size_t> pinned;   // of the host
  size_t held[2] = {0, 0}, most[2] = {0, 0};
  size_t pinned_held = 0, pinned_most = 0;
  std::map<c10::StreamId, Clock> streams;
  Clock host;
  std::map<c10::StreamId, std::deque<std::function<void()>>> waiting;  // copies that a stream has not come to yet
  std::vector<std::string> faults;
  std::vector<std::string> log;
  c10::StreamId streams_made = 0;
};

inline State& state() {
  static State* made = new State();  // never deleted: tensors outlive the end of Python
  return *made;
}

inline thread_local int current_device = 0;
inline thread_local c10::StreamId current_stream[2] = {0, 0};
inline thread_local bool is_inside = false;  // an operation of the device that copies to the CPU and back

// Stream 0 of each device has a clock of its own.
inline c10::StreamId key_of(int device, c10::StreamId stream) { return stream == 0 ? -1 - device : stream; }
inline c10::StreamId here(int device) { return key_of(device, current_stream[device]); }

// Do what a stream has not come to yet.
inline void run_waiting(c10::StreamId stream) {
  auto& queue = state().waiting[stream];
  while (!queue.empty()) {
    auto copy = std::move(queue.front());
    queue.pop_front();
    copy();
  }
}

// The host has waited for a stream as far as `clock` goes.
inline void host_knows(const Clock& clock) { merge(state().host, clock); }

inline std::string name_of(c10::StreamId stream) { return stream < 0 ? "the default stream" : "stream " + std::to_string(stream); }

// One operation on a stream begins; its time.
inline uint64_t begin(c10::StreamId stream) {
  Clock& clock = state().streams[stream];
  merge(clock, state().host);
  return ++clock[stream];
}

inline void use(void* pointer, bool writes, c10::StreamId stream, uint64_t time, const std::string& what) {
  auto found = state().blocks.find(pointer);
  if (found == state().blocks.end()) return;
  Block& block = found->second;
  const Clock& clock = state().streams[stream];
  auto refuse = [&](const char* how, c10::StreamId other) {
    throw std::runtime_error(what + " on " + name_of(stream) + " uses memory that " + name_of(other) + " " + how +
                             " without waiting for it: record an event there and wait for it here");
  };
  if (block.writer != -1 && block.writer != stream && !knows(clock, block.writer, block.written)) refuse("writes", block.writer);
  if (writes) {
    for (const auto& [other, read] : block.reads)
      if (other != stream && !knows(clock, other, read)) refuse("reads", other);
    block.writer = stream, block.written = time, block.reads.clear();
  } else {
    block.reads[stream] = time;
  }
}

inline void* take(size_t size, int device) {
  std::lock_guard guard(state().mutex);
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 64, std::max<size_t>(size, 64)) != 0) throw std::bad_alloc();
  std::fill_n(static_cast<unsigned char*>(pointer), size, 0xFF);  // nobody may rely on what new memory holds: this is no number
  Block& block = state().blocks[pointer];
  block = Block{};
  block.size = size, block.device = device, block.home = here(device);
  state().held[device] += size;
  state().most[device] = std::max(state().most[device], state().held[device]);
  return pointer;
}

inline void release(void* pointer) {
  std::lock_guard guard(state().mutex);
  auto found = state().blocks.find(pointer);
  if (found == state().blocks.end()) return;
  Block& block = found->second;
  Clock known = state().streams[block.home];
  merge(known, state().host);
  auto check = [&](c10::StreamId stream, uint64_t time) {
    bool is_recorded = std::count(block.recorded.begin(), block.recorded.end(), stream) > 0;
    if (stream != block.home && !is_recorded && !knows(known, stream, time))
      state().faults.push_back("memory of " + name_of(block.home) + " was freed while " + name_of(stream) +
                               " may still use it: call record_stream");
  };
  if (block.writer != -1) check(block.writer, block.written);
  for (const auto& [stream, time] : block.reads) check(stream, time);
  state().held[block.device] -= block.size;
  state().blocks.erase(found);
  std::free(pointer);
}

inline void* take_pinned(size_t size) {
  std::lock_guard guard(state().mutex);
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 64, std::max<size_t>(size, 64)) != 0) throw std::bad_alloc();
  state().pinned[pointer] = size;
  state().pinned_held += size;
  state().pinned_most = std::max(state().pinned_most, state().pinned_held);
  return pointer;
}

inline void release_pinned(void* pointer) {
  std::lock_guard guard(state().mutex);
  auto found = state().pinned.find(pointer);
  if (found == state().pinned.end()) return;
  state().pinned_held -= found->second;
  state().pinned.erase(found);
  std::free(pointer);
}

inline bool is_pinned(const void* pointer) {
  std::lock_guard guard(state().mutex);
  auto after = state().pinned.upper_bound(const_cast<void*>(pointer));
  if (after == state().pinned.begin()) return false;
  auto found = std::prev(after);
  return pointer < static_cast<const char*>(found->first) + std::max<size_t>(found->second, 1);
}

}  // namespace standin

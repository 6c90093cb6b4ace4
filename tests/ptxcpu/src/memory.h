// The memory that kernels touch: where it is, whether an access is right, and what it costs.
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "numbers.h"

namespace ptxcpu {

struct Warp;

// What a launch did.
struct Statistics {
  uint64_t warp_instructions = 0, lane_instructions = 0;
  // a request is a warp's instruction, a sector 32 bytes of global memory
  uint64_t global_load_requests = 0, global_load_sectors = 0, global_load_bytes = 0;
  uint64_t global_store_requests = 0, global_store_sectors = 0, global_store_bytes = 0;
  // a wavefront is a cycle of shared memory; ideal: without bank conflicts
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_wavefronts_ideal = 0;
  uint64_t flops = 0, mma_flops = 0;
  uint64_t barriers = 0;  // of whole blocks
  uint64_t atomics = 0;   // of lanes
  uint64_t local_requests = 0;
  uint64_t divergences = 0;  // groups of lanes run while others of the warp wait
  uint64_t errors = 0;
  // with Options::footprint: distinct sectors
  uint64_t footprint_read_sectors = 0, footprint_written_sectors = 0;
};

struct Region {
  uint64_t begin, end;
};

// The buffers of global memory.
class Regions {
 public:
  void add(uint64_t address, uint64_t bytes);
  void remove(uint64_t address);
  void clear() { regions_.clear(); }
  // The index of the region that holds all of [begin, end), or -1.
  int find(uint64_t begin, uint64_t end) const;
  const Region& operator[](int i) const { return regions_[i]; }
  int size() const { return int(regions_.size()); }
  // Where an address is, for a message.
  std::string describe(uint64_t address) const;

 private:
  std::vector<Region> regions_;  // by address
  mutable int last_ = 0;         // found last
};

// Which sectors a launch has read and written.
class Footprint {
 public:
  explicit Footprint(const Regions& regions) : regions_(regions) {}
  void enable();
  void read(int region, uint64_t begin, uint64_t bytes) { mark(read_, region, begin, bytes); }
  void write(int region, uint64_t begin, uint64_t bytes) { mark(written_, region, begin, bytes); }
  bool enabled() const { return enabled_; }
  void count(Statistics& statistics) const;

 private:
  using Bits = std::vector<std::vector<bool>>;  // of each region
  void mark(Bits& bits, int region, uint64_t begin, uint64_t bytes);
  const Regions& regions_;
  bool enabled_ = false;
  Bits read_, written_;
};

// What a warp knows of the accesses of the others. Time goes on where a barrier completes and
// where a warp arrives at one without waiting. What warp w did before known[w] has happened before
// whatever this warp does now.
struct WarpClock {
  std::vector<uint32_t> known;
  uint32_t all_known = 0;     // the least of known
  uint32_t synchronised = 1;  // counts __syncwarp and barriers: what orders a warp's own lanes
};

// Finds data races in shared memory, reads of what nobody wrote and touching what cp.async copies.
class SharedChecks {
 public:
  void reset(uint32_t bytes);
  void read(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
  void write(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
  // cp.async writes at any time between the two.
  void begin_copy(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
  void end_copy(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
  uint32_t time = 1;

 private:
  struct Cell {
    uint32_t written = 0, read = 0;                            // time; 0: never
    uint32_t written_synchronised = 0, read_synchronised = 0;  // the warp's, then
    uint32_t readers = 0;                                      // warps, since it was written
    uint16_t writer = 0, reader = 0;                           // threads, the last ones
    bool several_lanes = false;                                // of the last reading warp
    bool mixed = false;  // the readers read at different times
    bool initialised = false;
    uint8_t copies = 0;  // cp.async in flight
  };
  static constexpr uint32_t kCell = 2;  // bytes
  uint32_t time_of_read(const Cell& cell, int warp) const;
  void note_reader(const Warp& warp, Cell& cell);
  void read_cell(const Warp& warp, int thread, uint32_t offset, Cell& cell);
  void write_cell(const Warp& warp, int thread, uint32_t offset, Cell& cell);
  std::vector<Cell> cells_;
  // when each warp read a cell, where that is not the same for all readers: with named barriers
  std::map<const Cell*, std::array<uint32_t, 32>> times_of_reads_;
};

// cp.async of one thread: `bytes` from source, then zeros up to `size`.
struct AsyncCopy {
  int lane;
  uint32_t destination, size, bytes;
  uint64_t source;
};

// The copies of a warp. They are made as late as is allowed, so that a missing wait shows.
class AsyncCopies {
 public:
  void start(const AsyncCopy& copy) { current_.push_back(copy); }
  void commit();
  void wait(Warp& warp, size_t groups_left);
  void wait_all(Warp& warp);
  bool pending() const;

 private:
  static void make(Warp& warp, std::vector<AsyncCopy>& copies);
  std::vector<AsyncCopy> current_;
  std::deque<std::vector<AsyncCopy>> groups_;
};

enum class Space { kGeneric, kGlobal, kShared, kLocal, kParameter };

// [register + offset] of an instruction.
struct Address {
  uint32_t base;  // register
  bool wide;      // of 64 bits
  int64_t offset;
  Space space;
  void read(const Warp& warp, uint64_t* addresses) const;  // [32]
};

enum class Use { kLoad, kStore, kAtomic };

// Where the lanes of an access find their bytes. Reports what is wrong with it, takes the lanes out
// of the mask that may not do it, and counts it. False if none may.
bool resolve(Warp& warp, const Address& address, uint32_t bytes, Use use, Mask& mask,
             uint8_t** places);

// The same for the parts of instructions that have their own addresses.
void count_shared(Statistics& statistics, const uint32_t* offsets, uint32_t bytes, Mask mask);
void count_global(Warp& warp, const uint64_t* addresses, uint32_t bytes, Mask mask, bool write);
bool check_global(Warp& warp, uint64_t address, uint32_t bytes, uint32_t alignment,
                  const char* what);
bool check_shared(Warp& warp, uint64_t offset, uint32_t bytes, uint32_t alignment,
                  const char* what);

}  // namespace ptxcpu

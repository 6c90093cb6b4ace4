#include "memory.h"

#include <cstdio>

#include "machine.h"

namespace ptxcpu {
namespace {

constexpr uint64_t kSector = 32;

std::string hex(uint64_t x) {
  char text[20];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

// Of a warp's access: 32 bytes that several lanes touch count once.
int count_sectors(const uint64_t* addresses, uint32_t bytes, Mask mask) {
  uint64_t sectors[kLanes * 2];
  int n = 0;
  bool rising = true;
  for_lanes(mask, [&](int lane) {
    uint64_t last = (addresses[lane] + bytes - 1) / kSector;
    for (uint64_t sector = addresses[lane] / kSector; sector <= last; sector++) {
      if (n && sectors[n - 1] == sector) continue;
      rising = rising && (n == 0 || sectors[n - 1] < sector);
      sectors[n++] = sector;
    }
  });
  if (rising) return n;
  std::sort(sectors, sectors + n);
  return int(std::unique(sectors, sectors + n) - sectors);
}

}  // namespace

void Regions::add(uint64_t address, uint64_t bytes) {
  Region region = {address, address + bytes};
  auto by_begin = [](const Region& a, const Region& b) { return a.begin < b.begin; };
  regions_.insert(std::upper_bound(regions_.begin(), regions_.end(), region, by_begin), region);
}

void Regions::remove(uint64_t address) {
  auto it = std::find_if(regions_.begin(), regions_.end(),
                         [&](const Region& region) { return region.begin == address; });
  if (it != regions_.end()) regions_.erase(it);
}

int Regions::find(uint64_t begin, uint64_t end) const {
  auto holds = [&](const Region& region) { return region.begin <= begin && end <= region.end; };
  if (last_ < size() && holds(regions_[last_])) return last_;
  for (int i = 0; i < size(); i++) {
    if (holds(regions_[i])) return last_ = i;
  }
  return -1;
}

std::string Regions::describe(uint64_t address) const {
  const Region* below = nullptr;
  for (const Region& region : regions_) {
    if (region.begin <= address) below = &region;
  }
  if (!below) return "address " + hex(address) + " below every buffer";
  return "address " + hex(address) + ", byte " + std::to_string(address - below->begin) +
         " of a buffer of " + std::to_string(below->end - below->begin) + " bytes";
}

void Footprint::enable() {
  enabled_ = true;
  for (int i = 0; i < regions_.size(); i++) {
    size_t sectors = regions_[i].end / kSector - regions_[i].begin / kSector + 1;
    read_.emplace_back(sectors);
    written_.emplace_back(sectors);
  }
}

void Footprint::mark(Bits& bits, int region, uint64_t begin, uint64_t bytes) {
  uint64_t origin = regions_[region].begin / kSector;
  for (uint64_t sector = begin / kSector; sector <= (begin + bytes - 1) / kSector; sector++) {
    bits[region][sector - origin] = true;
  }
}

void Footprint::count(Statistics& statistics) const {
  for (const auto& region : read_) {
    statistics.footprint_read_sectors += std::count(region.begin(), region.end(), true);
  }
  for (const auto& region : written_) {
    statistics.footprint_written_sectors += std::count(region.begin(), region.end(), true);
  }
}

void SharedChecks::reset(uint32_t bytes) {
  cells_.assign(bytes / kCell + 1, Cell());
  times_of_reads_.clear();
  time = 1;
}

uint32_t SharedChecks::time_of_read(const Cell& cell, int warp) const {
  return cell.mixed ? times_of_reads_.at(&cell)[warp] : cell.read;
}

// Readers that this warp knows to be done with the cell are forgotten: what waits for this warp
// waits for them as well.
void SharedChecks::note_reader(const Warp& warp, Cell& cell) {
  if (cell.read == time && !cell.mixed) {  // all at the same time
    cell.readers |= 1u << warp.id;
    return;
  }
  const WarpClock& clock = warp.clock;
  if (cell.read >= clock.all_known) {
    for (uint32_t left = cell.readers; left; left &= left - 1) {
      int reader = first(left);
      bool done = reader == warp.id || time_of_read(cell, reader) < clock.known[reader];
      if (done) cell.readers &= ~(1u << reader);
    }
  } else {
    cell.readers = 0;
  }
  if (!cell.readers) {
    cell.mixed = false;
  } else if (cell.read != time && !cell.mixed) {
    times_of_reads_[&cell].fill(cell.read);
    cell.mixed = true;
  }
  if (cell.mixed) times_of_reads_[&cell][warp.id] = time;
  cell.readers |= 1u << warp.id;
}

void SharedChecks::read_cell(const Warp& warp, int thread, uint32_t offset, Cell& cell) {
  const WarpClock& clock = warp.clock;
  auto detail = [&] {
    return ": thread " + std::to_string(thread) + ", offset " + std::to_string(offset) +
           ", written by thread " + std::to_string(cell.writer);
  };
  if (cell.copies) {
    warp.report("shared memory read while a cp.async to it is in flight", detail());
  } else if (!cell.initialised) {
    warp.report("shared memory read before any write", detail());
    cell.initialised = true;
  }
  int writer = cell.writer / kLanes;
  if (cell.written && writer != warp.id) {
    if (cell.written >= clock.all_known && cell.written >= clock.known[writer]) {
      warp.report("shared race: read of what another warp wrote since the last barrier", detail());
    }
  } else if (cell.written_synchronised == clock.synchronised && cell.writer != thread &&
             cell.written && warp.launch->configuration.options.check > 1) {
    warp.report("shared hazard in a warp: read of what another lane wrote, no __syncwarp between",
                detail());
  }
  note_reader(warp, cell);
  bool mine = cell.reader / kLanes == warp.id && cell.read_synchronised == clock.synchronised;
  cell.several_lanes = mine && cell.read && (cell.several_lanes || cell.reader != thread);
  cell.reader = thread;
  cell.read = time;
  cell.read_synchronised = clock.synchronised;
}

void SharedChecks::write_cell(const Warp& warp, int thread, uint32_t offset, Cell& cell) {
  const WarpClock& clock = warp.clock;
  auto detail = [&](int other) {
    return ": thread " + std::to_string(thread) + ", offset " + std::to_string(offset) +
           ", the other thread " + std::to_string(other);
  };
  bool within_warp = warp.launch->configuration.options.check > 1;
  if (cell.written && cell.writer != thread) {
    int writer = cell.writer / kLanes;
    if (writer != warp.id) {
      if (cell.written >= clock.known[writer]) {
        warp.report("shared race: two warps write since the last barrier", detail(cell.writer));
      }
    } else if (within_warp && cell.written_synchronised == clock.synchronised) {
      warp.report("shared hazard in a warp: two lanes write, no __syncwarp between",
                  detail(cell.writer));
    }
  }
  if (cell.read && cell.readers) {
    bool race = false;
    for (uint32_t left = cell.readers & ~(1u << warp.id); left; left &= left - 1) {
      race = race || time_of_read(cell, first(left)) >= clock.known[first(left)];
    }
    if (race) {
      warp.report("shared race: write over what another warp read since the last barrier",
                  detail(cell.reader));
    } else if (within_warp && cell.reader / kLanes == warp.id &&
               (cell.several_lanes || cell.reader != thread) &&
               cell.read_synchronised == clock.synchronised) {
      warp.report("shared hazard in a warp: write over what another lane read, no __syncwarp",
                  detail(cell.reader));
    }
  }
  cell.written = time;
  cell.written_synchronised = clock.synchronised;
  cell.writer = thread;
  cell.readers = 0;
  cell.initialised = true;
}

void SharedChecks::read(const Warp& warp, int lane, uint32_t offset, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += kCell) {
    read_cell(warp, warp.id * kLanes + lane, offset + i, cells_[(offset + i) / kCell]);
  }
}

void SharedChecks::write(const Warp& warp, int lane, uint32_t offset, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += kCell) {
    Cell& cell = cells_[(offset + i) / kCell];
    if (cell.copies) {
      warp.report("shared memory written while a cp.async to it is in flight",
                  ": offset " + std::to_string(offset + i));
    }
    write_cell(warp, warp.id * kLanes + lane, offset + i, cell);
  }
}

void SharedChecks::begin_copy(const Warp& warp, int lane, uint32_t offset, uint32_t bytes) {
  write(warp, lane, offset, bytes);
  for (uint32_t i = 0; i < bytes; i += kCell) cells_[(offset + i) / kCell].copies++;
}

void SharedChecks::end_copy(const Warp& warp, int lane, uint32_t offset, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += kCell) {
    Cell& cell = cells_[(offset + i) / kCell];
    cell.copies--;
    write_cell(warp, warp.id * kLanes + lane, offset + i, cell);
  }
}

void AsyncCopies::commit() {
  groups_.push_back(std::move(current_));
  current_.clear();
}

void AsyncCopies::wait(Warp& warp, size_t groups_left) {
  while (groups_.size() > groups_left) {
    make(warp, groups_.front());
    groups_.pop_front();
  }
}

void AsyncCopies::wait_all(Warp& warp) {
  wait(warp, 0);
  make(warp, current_);
  current_.clear();
}

bool AsyncCopies::pending() const {
  return !current_.empty() || std::any_of(groups_.begin(), groups_.end(),
                                          [](const auto& group) { return !group.empty(); });
}

void AsyncCopies::make(Warp& warp, std::vector<AsyncCopy>& copies) {
  Block& block = *warp.block;
  for (const AsyncCopy& copy : copies) {
    if (warp.launch->configuration.options.check) {
      block.checks.end_copy(warp, copy.lane, copy.destination, copy.size);
    }
    uint8_t* to = block.shared + copy.destination;
    memcpy(to, reinterpret_cast<const void*>(copy.source), copy.bytes);
    memset(to + copy.bytes, 0, copy.size - copy.bytes);
  }
}

void Address::read(const Warp& warp, uint64_t* addresses) const {
  if (wide) {
    const uint64_t* from = Register<uint64_t>{base}(warp);
    for (int lane = 0; lane < kLanes; lane++) addresses[lane] = from[lane] + offset;
  } else {
    const uint32_t* from = Register<uint32_t>{base}(warp);
    for (int lane = 0; lane < kLanes; lane++) addresses[lane] = uint64_t(from[lane]) + offset;
  }
}

void count_shared(Statistics& statistics, const uint32_t* offsets, uint32_t bytes, Mask mask) {
  statistics.shared_requests++;
  // 128 bytes a wavefront: wider accesses take their lanes in 2 or 4 phases
  int phase = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint32_t words = std::max(1u, bytes / 4);
  for (int begin = 0; begin < kLanes; begin += phase) {
    Mask lanes = mask & (phase == 32 ? kAllLanes : ((1u << phase) - 1) << begin);
    if (!lanes) continue;
    uint32_t seen[kLanes][kLanes];  // distinct words of each bank
    uint8_t distinct[kLanes] = {};
    int worst = 1;
    for_lanes(lanes, [&](int lane) {
      for (uint32_t k = 0; k < words; k++) {
        uint32_t word = offsets[lane] / 4 + k, bank = word % kLanes;
        int i = 0;
        while (i < distinct[bank] && seen[bank][i] != word) i++;
        if (i < distinct[bank]) continue;
        seen[bank][distinct[bank]++] = word;
        worst = std::max(worst, i + 1);
      }
    });
    statistics.shared_wavefronts += worst;
    statistics.shared_wavefronts_ideal++;
  }
}

void count_global(Warp& warp, const uint64_t* addresses, uint32_t bytes, Mask mask, bool write) {
  Statistics& statistics = warp.launch->statistics;
  int sectors = count_sectors(addresses, bytes, mask);
  uint64_t all = uint64_t(count(mask)) * bytes;
  if (write) {
    statistics.global_store_requests++;
    statistics.global_store_sectors += sectors;
    statistics.global_store_bytes += all;
  } else {
    statistics.global_load_requests++;
    statistics.global_load_sectors += sectors;
    statistics.global_load_bytes += all;
  }
  Footprint& footprint = warp.launch->footprint;
  if (!footprint.enabled()) return;
  for_lanes(mask, [&](int lane) {
    int region = warp.launch->regions.find(addresses[lane], addresses[lane] + bytes);
    if (region < 0) return;
    if (write) {
      footprint.write(region, addresses[lane], bytes);
    } else {
      footprint.read(region, addresses[lane], bytes);
    }
  });
}

bool check_global(Warp& warp, uint64_t address, uint32_t bytes, uint32_t alignment,
                  const char* what) {
  if (address % alignment) {
    warp.report("misaligned global " + std::string(what), ": address " + hex(address));
    return false;
  }
  if (warp.launch->regions.find(address, address + bytes) < 0) {
    warp.report(
        "global " + std::string(what) + " out of bounds",
        ": " + std::to_string(bytes) + " bytes at " + warp.launch->regions.describe(address));
    return false;
  }
  return true;
}

bool check_shared(Warp& warp, uint64_t offset, uint32_t bytes, uint32_t alignment,
                  const char* what) {
  bool outside = offset + bytes > warp.block->shared_bytes;
  if (!outside && offset % alignment == 0) return true;
  warp.report("shared " + std::string(what) + (outside ? " out of bounds" : " misaligned"),
              ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
                  std::to_string(warp.block->shared_bytes));
  return false;
}

namespace {

Space window(const Warp& warp, uint64_t address) {
  if (warp.block->owns_shared(address)) return Space::kShared;
  if (warp.block->owns_local(address)) return Space::kLocal;
  if (warp.block->owns_parameters(address)) return Space::kParameter;
  return Space::kGlobal;
}

const char* verb(Use use) {
  return use == Use::kLoad ? "load" : use == Use::kStore ? "store" : "atomic";
}

void resolve_shared(Warp& warp, const uint64_t* addresses, uint32_t bytes, Use use, Mask& mask,
                    uint8_t** places) {
  Block& block = *warp.block;
  uint32_t offsets[kLanes];
  for_lanes(kAllLanes, [&](int lane) {
    offsets[lane] = uint32_t(addresses[lane]);
    places[lane] = block.shared + offsets[lane];
  });
  for_lanes(mask, [&](int lane) {
    if (!check_shared(warp, offsets[lane], bytes, std::min(bytes, 16u), verb(use))) {
      mask &= ~(1u << lane);
    }
  });
  const Options& options = warp.launch->configuration.options;
  if (options.statistics && mask) count_shared(warp.launch->statistics, offsets, bytes, mask);
  if (!options.check || use == Use::kAtomic) return;
  for_lanes(mask, [&](int lane) {
    if (use == Use::kLoad) {
      block.checks.read(warp, lane, offsets[lane], bytes);
    } else {
      block.checks.write(warp, lane, offsets[lane], bytes);
    }
  });
}

void resolve_global(Warp& warp, const uint64_t* addresses, uint32_t bytes, Use use, Mask& mask,
                    uint8_t** places) {
  uint64_t begin = ~0ull, end = 0, low_bits = 0;
  for_lanes(mask, [&](int lane) {
    begin = std::min(begin, addresses[lane]);
    end = std::max(end, addresses[lane]);
    low_bits |= addresses[lane] % bytes;
  });
  if (low_bits || warp.launch->regions.find(begin, end + bytes) < 0) {
    for_lanes(mask, [&](int lane) {
      if (!check_global(warp, addresses[lane], bytes, bytes, verb(use))) mask &= ~(1u << lane);
    });
  }
  for_lanes(kAllLanes,
            [&](int lane) { places[lane] = reinterpret_cast<uint8_t*>(addresses[lane]); });
  if (!warp.launch->configuration.options.statistics || !mask) return;
  count_global(warp, addresses, bytes, mask, use != Use::kLoad);
}

}  // namespace

bool resolve(Warp& warp, const Address& address, uint32_t bytes, Use use, Mask& mask,
             uint8_t** places) {
  uint64_t addresses[kLanes];
  address.read(warp, addresses);
  Block& block = *warp.block;
  Space space = address.space;
  if (space == Space::kGeneric) {
    space = window(warp, addresses[first(mask)]);
    uint64_t origin = space == Space::kShared      ? uint64_t(block.shared)
                      : space == Space::kParameter ? uint64_t(warp.launch->parameters.data())
                                                   : 0;
    for (uint64_t& each : addresses) each -= origin;
  }
  switch (space) {
    case Space::kParameter:
      for_lanes(mask, [&](int lane) {
        places[lane] = warp.launch->parameters.data() + addresses[lane];
        if (addresses[lane] + bytes <= warp.launch->parameters.size() && use == Use::kLoad) return;
        warp.report("access to kernel parameters out of bounds or not a load");
        mask &= ~(1u << lane);
      });
      break;
    case Space::kLocal:
      if (warp.launch->configuration.options.statistics) warp.launch->statistics.local_requests++;
      for_lanes(mask, [&](int lane) {
        places[lane] = reinterpret_cast<uint8_t*>(addresses[lane]);
        uint64_t begin = uint64_t(block.local_of(warp.id * kLanes + lane));
        if (addresses[lane] - begin + bytes <= block.local_bytes) return;
        warp.report("local memory out of bounds");
        mask &= ~(1u << lane);
      });
      break;
    case Space::kShared: resolve_shared(warp, addresses, bytes, use, mask, places); break;
    default: resolve_global(warp, addresses, bytes, use, mask, places);
  }
  return mask != 0;
}

}  // namespace ptxcpu

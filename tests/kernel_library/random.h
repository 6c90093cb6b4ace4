// Random numbers that are the same with every standard library, and cheap in an emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

class Random {
  std::mt19937_64 bits_;

 public:
  explicit Random(uint64_t seed) : bits_(seed) {}

  size_t below(size_t n) { return size_t(bits_() % n); }
  int percent() { return int(below(100)); }

  // Mean 0, variance 1, close to normal: the sum of four uniform numbers of 16 bits.
  double normal() {
    const uint64_t bits = bits_();
    double sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += double(bits >> shift & 0xffff) / 0xffff;
    return (sum - 2) * 1.7320508075688772;
  }
};

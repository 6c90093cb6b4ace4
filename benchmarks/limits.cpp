// What this machine can do at best: passes over memory and multiply-adds, on as many threads as the
// contenders have. Compiled by limits.py for the CPU it runs on.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kChains = 16;  // chains of dependent FMAs: more than ports x latency
#else
constexpr int kLanes = 8, kChains = 12;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// body(begin, end) over [0, n) on `threads` threads, this one among them.
template <typename Body>
void split(int64_t n, int threads, const Body& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i)
    others.emplace_back([&, i] { body(n * i / threads, n * (i + 1) / threads); });
  body(0, n / threads);
  for (std::thread& other : others) other.join();
}

// Not by memcpy: where g++ prefers narrower vectors it goes through the stack and waits for it.
inline const Vec& vec(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline Vec& vec(float* x) { return *reinterpret_cast<Vec*>(x); }

}  // namespace

extern "C" {

// Reads every input and writes every output once. inputs [reads][count], outputs [writes][count].
void limits_stream(const float* const* inputs, int reads, float* const* outputs, int writes,
                   int64_t count, int threads) {
  split(count / kLanes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes) {
      Vec sum = vec(inputs[0] + i);
      for (int j = 1; j < reads; ++j) sum += vec(inputs[j] + i);
      for (int j = 0; j < writes; ++j) vec(outputs[j] + i) = sum;
    }
  });
}

// Reads and writes every element `passes` times. state [count].
void limits_state(float* state, int64_t count, int64_t passes, float factor, int threads) {
  split(count / kLanes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes) vec(state + i) *= factor;
      asm volatile("" ::: "memory");  // every pass goes to memory
    }
  });
}

// Does `count` multiply-adds of floats; their sum keeps the compiler from leaving them out.
float limits_fma(int64_t count, int threads) {
  std::vector<float> sums(threads);
  split(threads, threads, [&](int64_t begin, int64_t) {
    Vec factor, term, x[kChains];
    for (int i = 0; i < kLanes; ++i) factor[i] = 0.5f, term[i] = 1.0f;
    for (Vec& chain : x) chain = term;
    const int64_t rounds = count / threads / (kLanes * kChains);
    for (int64_t round = 0; round < rounds; ++round)
      for (Vec& chain : x) chain = chain * factor + term;
    float sum = 0;
    for (const Vec& chain : x)
      for (int i = 0; i < kLanes; ++i) sum += chain[i];
    sums[begin] = sum;
  });
  float sum = 0;
  for (float s : sums) sum += s;
  return sum;
}
}

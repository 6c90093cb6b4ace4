// How every entry point runs: which kernels, on how many threads, and what becomes of an exception.
#pragma once

#include <algorithm>
#include <atomic>
#include <new>
#include <string>

#include "arguments.h"
#include "cpu/select.h"

namespace rwkv6 {

// Below this many multiply-adds waking other threads costs more than it saves (about 10 us).
constexpr int64_t kWorthThreads = 1 << 18;

class Threads {
  const rwkv6_context* context_;

 public:
  Threads(const rwkv6_context* context, int64_t work)
      : context_(context && context->parallel_for && work >= kWorthThreads ? context : nullptr) {}

  bool many() const { return context_; }

  // Parts to cut N columns of each of `units` heads into, none narrower than `narrowest`: as many
  // as finish first on the threads there are, when each repeats the share `repeated` of a head's
  // work. The results do not depend on it.
  int64_t parts(int64_t units, int64_t N, int64_t narrowest, double repeated) const {
    const int64_t threads = context_ ? context_->num_threads : 1;
    if (threads == 1) return 1;
    const int64_t most = std::min((N + narrowest - 1) / narrowest, threads);
    const auto time = [&](int64_t parts) {
      const int64_t on_one_thread = (units * parts + threads - 1) / threads;
      return double(on_one_thread) * (repeated + (1 - repeated) / double(parts));
    };
    int64_t best = 1;
    for (int64_t parts = 2; parts <= most; parts++)
      if (time(parts) < time(best)) best = parts;
    return best;
  }

  // f(begin, end) over [0, n), which may throw std::bad_alloc.
  template <class F>
  void run(int64_t n, const F& f) const {
    struct Body {
      const F& f;
      std::atomic<bool> out_of_memory{false};
      static void call(void* data, int64_t begin, int64_t end) {
        Body* body = static_cast<Body*>(data);
        try {
          body->f(begin, end);
        } catch (const std::bad_alloc&) {  // must not cross the caller's thread pool
          body->out_of_memory = true;
        }
      }
    } body{f};
    if (n <= 0) return;
    if (context_ && n > 1)
      context_->parallel_for(context_->pool, n, &Body::call, &body);
    else
      Body::call(&body, 0, n);
    if (body.out_of_memory) throw std::bad_alloc();
  }
};

inline const KernelsOf& kernels(DType inputs) {
  const Kernels* chosen = select_kernels();
  if (!chosen) throw ArgumentError(no_kernels_message());
  return inputs == DType::f64 ? chosen->f64 : chosen->f32;
}

template <class Job>
void run(const Threads& threads, const Job& job, void (*kernel)(const Job&, int64_t, int64_t)) {
  threads.run(job.units(), [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// Runs f; NULL, or the message of what it threw.
template <class F>
const char* message_of(const F& f) {
  thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::runtime_error& error) {  // the caller's mistake, or what a GPU refused
    message = error.what();
  } catch (const std::bad_alloc&) {
    return "rwkv6: out of memory";
  } catch (...) {
    return "rwkv6: unexpected failure";
  }
  return message.c_str();
}

}  // namespace rwkv6

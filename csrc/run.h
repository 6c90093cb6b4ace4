// How every entry point runs: with which kernels, on how many threads, and how an exception becomes
// the message that it returns.
#pragma once

#include <algorithm>
#include <atomic>
#include <new>
#include <string>

#include "arguments.h"
#include "cpu/select.h"

namespace rwkv6 {

// Below this many multiply-adds, waking other threads (about 10 us) costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 18;

class Threads {
  const rwkv6_context* context_;

 public:
  Threads(const rwkv6_context* context, int64_t work)
      : context_(context && context->parallel_for && work >= kWorthThreads ? context : nullptr) {}

  bool many() const { return context_; }

  // How many parts to cut the N columns of each of `units` heads into, none narrower than
  // `narrowest`: the number that finishes first on the threads there are. `repeated` is the share
  // of a head's work that every part has to do again. Results do not depend on the number.
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

  // Runs a kernel on all work units of a job.
  template <class Job>
  void run(const Job& job, void (*kernel)(const Job&, int64_t, int64_t)) const {
    struct Body {
      const Job& job;
      void (*kernel)(const Job&, int64_t, int64_t);
      std::atomic<bool> out_of_memory{false};
      static void call(void* data, int64_t begin, int64_t end) {
        Body* body = static_cast<Body*>(data);
        try {
          body->kernel(body->job, begin, end);
        } catch (const std::bad_alloc&) {  // must not cross the caller's thread pool
          body->out_of_memory = true;
        }
      }
    } body{job, kernel};
    const int64_t n = job.units();
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

// Runs f; NULL, or the message of what it threw.
template <class F>
const char* message_of(const F& f) {
  thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::runtime_error& error) {  // the caller's mistake, or an error of CUDA
    message = error.what();
  } catch (const std::bad_alloc&) {
    return "rwkv6: out of memory";
  } catch (...) {
    return "rwkv6: unexpected failure";
  }
  return message.c_str();
}

}  // namespace rwkv6

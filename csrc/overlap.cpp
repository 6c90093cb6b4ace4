// Both questions are whether a sum of bounded multiples of strides can have a given value:
//
//   sum_i a_i x_i = target,  0 <= x_i <= most_i,  a_i > 0
//
// A search over x, the largest a first, answers it exactly. At each step the terms that are left
// bound what x_i may be, and their greatest common divisor must divide what is left. Tensors whose
// dimensions nest, as those of any sliced or transposed tensor do, leave at most two values of x_i
// to try. Dimensions that interleave in odd ways can need a long search, so it has a limit; past it
// the answer is "yes", which refuses a call instead of computing a wrong result.
#include "overlap.h"

#include <algorithm>
#include <numeric>

namespace rwkv6 {
namespace {

constexpr int64_t kMostSteps = 1 << 20;

struct Term {
  int64_t a, most;
};

class Search {
  std::vector<Term> terms_;             // the largest a first
  std::vector<int64_t> rest_, common_;  // of the terms from i on: largest sum, common divisor
  std::vector<int64_t> trivial_;        // a solution that does not count; empty: all count
  int64_t steps_ = 0;

  // Whether the terms from i on can sum up to `target`. `same`: x is so far the trivial solution.
  bool solvable_from(size_t i, int64_t target, bool same) {
    if (++steps_ > kMostSteps) return true;
    if (target < 0 || target > rest_[i]) return false;
    if (i == terms_.size()) return !same;
    if (target % common_[i]) return false;
    const Term& term = terms_[i];
    const int64_t missing = target - rest_[i + 1];  // at least this much must come from this term
    int64_t x = missing > 0 ? (missing + term.a - 1) / term.a : 0;
    const int64_t last = std::min(term.most, target / term.a);
    for (; x <= last; x++)
      if (solvable_from(i + 1, target - term.a * x, same && x == trivial_[i])) return true;
    return false;
  }

 public:
  // Terms of the same stride become one.
  explicit Search(std::vector<Term> terms) {
    std::sort(terms.begin(), terms.end(), [](Term x, Term y) { return x.a > y.a; });
    for (const Term& term : terms) {
      if (!term.most) continue;
      if (!terms_.empty() && terms_.back().a == term.a)
        terms_.back().most += term.most;
      else
        terms_.push_back(term);
    }
    rest_.assign(terms_.size() + 1, 0);
    common_.assign(terms_.size() + 1, 0);
    for (size_t i = terms_.size(); i-- > 0;) {
      rest_[i] = rest_[i + 1] + terms_[i].a * terms_[i].most;
      common_[i] = std::gcd(common_[i + 1], terms_[i].a);
    }
  }

  bool solvable(int64_t target) { return solvable_from(0, target, false); }

  // Whether there is a solution besides the one where every x_i is half of its most.
  bool solvable_besides_the_middle() {
    int64_t target = 0;
    for (const Term& term : terms_) {
      trivial_.push_back(term.most / 2);
      target += term.a * (term.most / 2);
    }
    return solvable_from(0, target, true);
  }
};

}  // namespace

// Two elements i and i' share memory when sum stride (i - i') = 0. With x = i - i' + size - 1 that
// is a sum of x from 0 to 2 (size - 1), and i = i' is the middle.
bool overlaps_itself(const std::vector<Dimension>& dims) {
  std::vector<Dimension> sorted;
  for (const Dimension& d : dims) {
    if (d.size == 0) return false;
    if (d.size > 1) sorted.push_back({d.stride < 0 ? -d.stride : d.stride, d.size});
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const Dimension& x, const Dimension& y) { return x.stride < y.stride; });
  bool nested = true;
  int64_t span = 1;  // of the dimensions so far, in elements
  for (size_t i = 0; i < sorted.size(); i++) {
    const Dimension& d = sorted[i];
    if (!d.stride || (i && d.stride == sorted[i - 1].stride)) return true;
    nested = nested && d.stride >= span;
    span += d.stride * (d.size - 1);
  }
  if (nested) return false;
  std::vector<Term> terms;
  for (const Dimension& d : sorted) terms.push_back({d.stride, 2 * (d.size - 1)});
  return Search(terms).solvable_besides_the_middle();
}

// Tensors a and b share a byte when begin_a + sum stride i + p = begin_b + sum stride j + q for
// indices i and j and bytes p and q of their elements. What is subtracted is counted from its other
// end instead.
bool overlap(const Extent& a, const Extent& b) {
  std::vector<Term> terms;
  int64_t target = b.begin - a.begin;
  const auto add = [&](int64_t stride, int64_t size) {  // + stride * index
    if (stride < 0) target += -stride * (size - 1);
    terms.push_back({stride < 0 ? -stride : stride, size - 1});
  };
  for (const Extent* x : {&a, &b}) {
    const int64_t sign = x == &a ? 1 : -1;
    for (const Dimension& d : x->dims) {
      if (d.size == 0) return false;
      if (d.stride && d.size > 1) add(sign * d.stride, d.size);
    }
    add(sign, x->element);
  }
  return Search(terms).solvable(target);
}

}  // namespace rwkv6

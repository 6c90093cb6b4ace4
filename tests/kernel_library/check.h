// Counting what passed and what failed, and the largest errors met on the way.
#pragma once

#include <cmath>
#include <cstdio>
#include <ctime>
#include <map>
#include <string>
#include <utility>
#include <vector>

class Report {
  int passed_ = 0, failed_ = 0;
  std::map<std::string, std::pair<double, double>> largest_;  // what: (error, limit)

 public:
  void check(bool good, const std::string& what) {
    good ? passed_++ : failed_++;
    if (!good) printf("FAILED %s\n", what.c_str());
  }

  // |found - expected| / |expected| in root mean square; the plain norm where expected is zero.
  void close(const std::vector<double>& found, const std::vector<double>& expected, double limit,
             const std::string& kind, const std::string& where) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < expected.size(); i++) {
      difference += (found[i] - expected[i]) * (found[i] - expected[i]);
      size += expected[i] * expected[i];
    }
    const double error = std::sqrt(size > 0 ? difference / size : difference);
    auto& largest = largest_.try_emplace(kind, error, limit).first->second;
    if (!(error <= largest.first)) largest = {error, limit};
    char text[64];
    snprintf(text, sizeof text, ": error %.3g, at most %.3g", error, limit);
    check(found.size() == expected.size() && error <= limit, kind + ", " + where + text);
  }

  // A line of progress: an emulator takes its time.
  void passed_by(const char* what) const {
    printf("%s: %d passed, %d failed after %.1f s\n", what, passed_, failed_,
           double(std::clock()) / CLOCKS_PER_SEC);
  }

  int finish() const {
    for (const auto& [kind, error] : largest_)
      printf("%-28s largest error %.2e, at most %.2e\n", kind.c_str(), error.first, error.second);
    printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ ? 1 : 0;
  }
};

void test_accuracy(Report& report);
void test_promises(Report& report);
void test_sizes(Report& report);

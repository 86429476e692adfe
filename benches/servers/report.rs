//! The tables: each server's numbers, and their ratio to the yardstick's in the same run.

use serde::Serialize;

use super::Shape;
use super::load::Outcome;
use super::server::YARDSTICK;
use super::trace::Calls;

/// All rounds of one shape of load.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    pub(crate) shape: Shape,
    pub(crate) rows: Vec<Row>,
}

/// All rounds of one server.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) rounds: Vec<Outcome>,
    /// A round that could not be measured, and why.
    pub(crate) failure: Option<String>,
}

/// What differs by more than this from itself is not measured.
const INCONCLUSIVE: f64 = 0.05;

impl Row {
    /// Processor time of the server, in microseconds for each connection, or for each request
    /// where there are several: the smallest of all rounds. What disturbs a round only adds to it.
    fn cpu(&self, shape: &Shape) -> f64 {
        let cost = |outcome: &Outcome| {
            let units = if shape.kept() { outcome.requests } else { outcome.connections };
            outcome.server_cpu_us / units as f64
        };
        self.rounds.iter().map(cost).fold(f64::INFINITY, f64::min)
    }

    fn median(&self, of: impl Fn(&Outcome) -> f64) -> f64 {
        let mut values: Vec<f64> = self.rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn sum(&self, of: impl Fn(&Outcome) -> i64) -> i64 {
        self.rounds.iter().map(of).sum()
    }
}

impl Table {
    /// The yardstick measured twice, its second value by its first.
    fn twice(&self) -> f64 {
        let mut twice = self.rows.iter().filter(|row| row.name == YARDSTICK);
        let mut next = || twice.next().map_or(f64::NAN, |row| row.cpu(&self.shape));
        let first = next();
        next() / first
    }

    pub(crate) fn print(&self) {
        let Some(yardstick) = self.rows.iter().find(|row| row.name == YARDSTICK) else { return };
        let unit = if self.shape.kept() { "req" } else { "conn" };
        println!("\n{}", self.shape);
        println!(
            "{:<31} {:>8} {:>9} {:>6} {:>9} {:>9} {:>9} {:>8} {:>7}",
            "server",
            format!("{unit}/s"),
            format!("CPU us/{unit}"),
            "ratio",
            "p50 us",
            "p99 us",
            "overflows",
            "unfinished",
            "errors"
        );
        for row in &self.rows {
            if let Some(failure) = &row.failure {
                println!("{:<31} not measured: {failure}", row.name);
                continue;
            }
            let rate = |outcome: &Outcome| match self.shape.kept() {
                true => outcome.requests_a_second,
                false => outcome.connections_a_second,
            };
            let cpu = row.cpu(&self.shape);
            println!(
                "{:<31} {:>8.0} {:>11.1} {:>6.2} {:>9} {:>9} {:>9} {:>10} {:>7}{}",
                row.name,
                row.median(rate),
                cpu,
                cpu / yardstick.cpu(&self.shape),
                row.median(|outcome| outcome.p50_us as f64),
                row.median(|outcome| outcome.p99_us as f64),
                row.sum(|outcome| outcome.listen_overflows),
                row.sum(|outcome| outcome.unfinished as i64),
                row.sum(|outcome| outcome.errors as i64),
                match row.sum(|outcome| outcome.lost as i64) {
                    0 => String::new(),
                    lost => format!("  {lost} idle connections lost"),
                }
            );
            if let Some(error) = row.rounds.iter().find_map(|round| round.first_error.as_ref()) {
                println!("{:<31}   {error}", "");
            }
        }
        let twice = self.twice();
        let verdict = if (twice - 1.0).abs() > INCONCLUSIVE { ": inconclusive" } else { "" };
        println!("{YARDSTICK} against itself: {twice:.3}{verdict}");
    }
}

/// The growth with idle connections: each server's CPU a request, and by that without any.
pub(crate) fn print_idle(tables: &[Table]) {
    let names = tables.first().into_iter().flat_map(|table| &table.rows).map(|row| &row.name);
    println!("\nServer CPU in us a request, and how many times that with no idle connection");
    print!("{:<20}", "server");
    for table in tables {
        print!(" {:>18}", format!("{} idle", table.shape.idle));
    }
    println!();
    for (index, name) in names.enumerate() {
        print!("{name:<20}");
        let alone = tables[0].rows[index].cpu(&tables[0].shape);
        for table in tables {
            let row = table.rows.iter().find(|row| &row.name == name);
            match row.filter(|row| row.failure.is_none()) {
                Some(row) => {
                    let cpu = row.cpu(&table.shape);
                    print!(" {:>18}", format!("{cpu:.1} ({:.2})", cpu / alone));
                }
                None => print!(" {:>18}", "-"),
            }
        }
        println!();
        for table in tables {
            for row in table.rows.iter().filter(|row| &row.name == name) {
                let lost = row.sum(|outcome| outcome.lost as i64);
                if let Some(failure) = &row.failure {
                    println!("  {} idle: {failure}", table.shape.idle);
                } else if lost > 0 {
                    println!("  {} idle: {lost} of them were lost", table.shape.idle);
                }
            }
        }
    }
}

/// Who makes how many system calls.
pub(crate) fn print_calls(calls: &[(String, Result<Calls, String>)]) {
    println!("\nSystem calls a connection (15 clients, under strace, which slows the server down)");
    for (name, calls) in calls {
        match calls {
            Ok(calls) => println!("{name:<31} {:>6.2}  {}", calls.sum(), calls.list()),
            Err(error) => println!("{name:<31} not counted: {error}"),
        }
    }
}

package policy

import (
	"fmt"
	"time"
)

// Date is a day, in UTC. The zero value is none.
type Date struct{ day time.Time }

// NewDate gives the day on which a time lies in UTC.
func NewDate(t time.Time) Date { return Date{t.UTC().Truncate(24 * time.Hour)} }

// IsZero tells whether no day is given.
func (d Date) IsZero() bool { return d.day.IsZero() }

// End is the first moment after the day; the zero time where there is none.
func (d Date) End() time.Time {
	if d.IsZero() {
		return time.Time{}
	}
	return d.day.AddDate(0, 0, 1)
}

// String gives the day as ISO 8601 writes it.
func (d Date) String() string { return d.day.Format(time.DateOnly) }

// MarshalText gives the day as ISO 8601 writes it.
func (d Date) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a day such as 2027-01-31.
func (d *Date) UnmarshalText(text []byte) error {
	day, err := time.ParseInLocation(time.DateOnly, string(text), time.UTC)
	if err != nil || day.Year() < 2000 {
		return fmt.Errorf("a date is written like 2027-01-31, not %.32q", text)
	}
	d.day = day
	return nil
}

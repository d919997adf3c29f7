output "address" {
  description = "Where the name in url has to lead: an A record."
  value       = aws_eip.coordinator.public_ip
}
